"""The learning rate range test."""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..optimizers.arguments import check_number, described, put_number, whole_at_least
from .figure import axes_to_fill, figure_of
from .module_tree import reshard
from .progress import Bar
from .restoring import restored
from .table import text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

Floats: TypeAlias = "NDArray[np.float64]"

# The methods that suggest a learning rate, and how tables and plots describe them.
METHODS = {
    "steepest": "where the smoothed loss falls fastest",
    "minimum": "a tenth of the rate where it is lowest",
    "valley": "in the middle of its longest fall",
}


@dataclass(frozen=True, eq=False)
class LRRangeTest:
    """The result of a learning rate range test: the losses by learning rate, and the suggested rates.

    The attributes have the names of the arguments.

    Args:
        lrs: Learning rate of each step, in the group with the largest rate. float64, increasing.
        losses: Loss before each step, float64. The effect of the step at ``lrs[i]`` is in ``losses[i + 1]``. The last
            loss may be NaN or infinite.
        smoothed: Bias-corrected exponential running average of ``losses``.
        diverged: Whether the test ended early because the loss diverged.
        smoothing: Coefficient of the running average, in [0, 1).

    Example:
        >>> lrs = np.geomspace(1e-4, 1.0, 9)
        >>> losses = np.array([9.0, 8.9, 8.5, 7.0, 3.0, 1.0, 0.5, 2.0, 30.0])
        >>> result = onepass.LRRangeTest(lrs, losses, smoothed=losses)
        >>> round(result.suggestion("minimum"), 4)
        0.01
    """

    lrs: Floats
    losses: Floats
    smoothed: Floats
    diverged: bool = False
    smoothing: float = 0.0

    def suggestion(self, method: Literal["steepest", "minimum", "valley"] = "steepest") -> float:
        r"""Return a learning rate to train with, from the smoothed loss :math:`s` as a function of :math:`\eta`.

        The steps before the :math:`1 / (1 - \text{smoothing})`-th are ignored, because their averages contain few
        losses and are noisy. A loss that is not finite is ignored, too.

        There is no suggestion in three cases: the smoothed loss did not fall; it was lowest at the last rate, so no
        rate was too large; or it fell by less than 7 standard deviations of the batches' noise. Losses of pure noise
        fall that far, from the first to the lowest, in less than one test in a hundred. The noise of a loss is
        estimated from its distance to the mean of its neighbours (root mean square, up to the lowest :math:`s`). The
        noise of the running average is :math:`\sqrt{(1 - \beta) / (1 + \beta)}` times that.

        Args:
            method: ``"steepest"``: the :math:`\eta` up to the minimum of :math:`s` at which
                :math:`ds / d \log \eta` (central differences) is lowest. ``"minimum"``: a tenth of the :math:`\eta` at
                which :math:`s` is lowest. ``"valley"``: let :math:`n` be the length and :math:`e` the end of the
                longest decreasing subsequence of :math:`s` (not necessarily contiguous); the middle of the :math:`n`
                steps that end at :math:`e`. This is fastai's suggestion to within two steps
                (``fastai.callback.schedule.valley``), and the least sensitive to single outliers.

        Raises:
            ValueError: There is no such method, or there is no suggestion; the message gives the reason.
        """
        if method not in METHODS:
            raise ValueError(f"suggestion: method must be one of {tuple(METHODS)}, got {method!r}")
        if why := self._why_none():
            raise ValueError(f"no learning rate to suggest: {why}")
        lrs, smoothed = self._curve
        lowest = int(np.argmin(smoothed))
        if method == "minimum":
            return float(lrs[lowest] / 10)
        if method == "valley":
            end, length = _longest_fall(smoothed)
            return float(lrs[end - length // 2])
        slopes = np.gradient(smoothed, np.log(lrs))
        return float(lrs[np.argmin(slopes[: lowest + 1])])

    @property
    def _settled(self) -> int:
        """Number of steps at the beginning that are ignored."""
        return round(1 / (1 - self.smoothing)) - 1

    @property
    def _curve(self) -> tuple[Floats, Floats]:
        """The learning rates and smoothed losses that suggestions are computed from."""
        finite = np.isfinite(self.smoothed)
        return self.lrs[finite][self._settled :], self.smoothed[finite][self._settled :]

    def _why_none(self) -> str:
        """Return why there is nothing to suggest; empty if there is a suggestion."""
        steps, left_out = len(self.lrs), self._settled
        if not np.isfinite(self.losses[0]):
            return f"the loss was {self.losses[0]} before the first step: look at the data, the model and the loss"
        lrs, smoothed = self._curve
        if left_out and len(smoothed) < 2:
            return f"{steps} steps are too few for the smoothing {self.smoothing:g}: the first {left_out} are left out"
        lowest = int(np.argmin(smoothed))
        if lowest == 0:
            return f"the loss did not fall in any of the {steps} steps"
        if left_out + lowest == steps - 1:
            return f"the loss was lowest at the last rate, {lrs[-1]:.2e}: raise end"
        fall, noise = smoothed[0] - smoothed[lowest], self._noise(left_out + lowest)
        if fall < 7 * noise:
            return (
                f"the loss fell by {fall:.2g}, less than 7 times its noise of {noise:.2g}: raise accumulate, smoothing "
                "or steps"
            )
        return ""

    def _noise(self, end: int) -> float:
        """Return the standard deviation of the smoothed loss due to the batches, from the losses up to step ``end``."""
        losses = self.losses[self._settled : end + 1]
        if len(losses) < 5:
            losses = self.losses[np.isfinite(self.losses)]
        bends = np.diff(losses, 2)  # for independent losses, 6 times their variance; a trend adds hardly any
        variance = np.mean(bends**2) / 6 if len(bends) else 0.0
        return math.sqrt(variance * (1 - self.smoothing) / (1 + self.smoothing))

    def suggestions(self) -> dict[str, float]:
        """Return the suggestion of each method; empty if there is no suggestion (:meth:`suggestion`)."""
        try:
            return {method: self.suggestion(method) for method in METHODS}  # type: ignore[arg-type]
        except ValueError:
            return {}

    def table(self) -> str:
        """Return a table with a row per step: its number, learning rate, loss and smoothed loss."""
        steps = enumerate(zip(self.lrs, self.losses, self.smoothed, strict=True), 1)
        rows = [(step, f"{lr:.4e}", f"{loss:.6g}", f"{average:.6g}") for step, (lr, loss, average) in steps]
        return text_table([("step", "lr", "loss", "smoothed loss"), *rows], ">")

    def __str__(self) -> str:
        end = "; there the loss diverged" if self.diverged else ""
        title = f"LR range test: {len(self.lrs)} steps, lr {self.lrs[0]:.2e} to {self.lrs[-1]:.2e}{end}"
        if why := self._why_none():
            return f"{title}\n  no suggestion: {why}"
        rows = [(method, f"{lr:.2e}", METHODS[method]) for method, lr in self.suggestions().items()]
        return f"{title}\n{textwrap.indent(text_table(rows, '<><'), '  ')}"

    def plot(self, ax: Axes | None = None, path: str | PathLike[str] | None = None) -> Figure:
        """Plot the losses against the learning rate, with the suggestions.

        Args:
            ax: Axes to draw into; by default, those of a new figure.
            path: File to save the figure to. Its suffix gives the format (.svg, .pdf, ...); without a suffix, PNG. With
                neither ``path`` nor ``ax`` the figure is shown by :func:`matplotlib.pyplot.show`.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is not installed: ``pip install onepass[plots]``.
        """
        finite = np.isfinite(self.smoothed)
        # Where the loss diverges, the losses of single batches may be far above the smoothed loss; they are cut off.
        low, high = (self.losses[finite].min(), self.smoothed[finite].max()) if finite.any() else (0.0, 1.0)
        margin = 0.1 * (high - low) or 1.0
        with axes_to_fill(ax, path, figsize=(7, 4), dpi=110) as filled:
            filled.plot(self.lrs, self.losses, color="#a9cbea", linewidth=1, label="loss of the batch")
            filled.plot(self.lrs, self.smoothed, color="#2f6aa8", linewidth=2, label="smoothed")
            for (method, lr), marker in zip(self.suggestions().items(), "osD", strict=False):
                height = np.interp(lr, self.lrs, self.smoothed)
                label = f"{method}: {lr:.1e}"
                filled.plot(lr, height, marker, color="#cf3f54", markersize=8, markeredgecolor="white", label=label)
            filled.set(xscale="log", xlabel="learning rate", ylabel="training loss", ylim=(low - margin, high + margin))
            filled.grid(axis="y", color="0.9")
            filled.legend(frameon=False)
        return figure_of(filled)


def _longest_fall(values: Floats) -> tuple[int, int]:
    """Return the end and the length of the longest decreasing subsequence; of several, the one that ends first."""
    lengths = np.ones(len(values), dtype=np.int64)
    for i in range(1, len(values)):
        lengths[i] += np.max(lengths[:i], where=values[:i] > values[i], initial=0)
    end = int(np.argmax(lengths))
    return end, int(lengths[end])


def lr_find(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    loader: Iterable[Any],
    *,
    start: float = 1e-7,
    end: float = 10.0,
    steps: int = 100,
    ramp: Literal["exponential", "linear"] = "exponential",
    smoothing: float = 0.8,
    diverges_at: float = 4.0,
    accumulate: int = 1,
    progress: bool = True,
    device: torch.device | str | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
) -> LRRangeTest:
    r"""Run a learning rate range test: train with an increasing learning rate, and record the loss.

    Step :math:`i` of :math:`n`, from 0, is an optimizer step with the learning rate

    .. math::
        \eta_i = \eta_\text{start} (\eta_\text{end} / \eta_\text{start})^{i / (n-1)} \quad\text{(exponential)}, \qquad
        \eta_i = \eta_\text{start} + (\eta_\text{end} - \eta_\text{start}) \, i / (n-1) \quad\text{(linear)}

    Its loss :math:`l_i` enters a bias-corrected running average with the coefficient :math:`\beta`:

    .. math::
        m_i = \beta m_{i-1} + (1 - \beta) l_i, \qquad s_i = m_i / (1 - \beta^{i+1})

    The test ends early, as diverged, when :math:`l_i` is not finite, or when :math:`s_i` exceeds the lowest :math:`s`
    so far, :math:`s^*`, by more than ``(diverges_at - 1)`` :math:`|s^*|`.

    Afterwards everything is restored in place, bit for bit: parameters and buffers, gradients, the optimizer's groups
    and states, averages, copies, the statistics of a clipping policy, ``last_step``, attributes of modules (train or
    eval mode), the random number generators of torch, Python and NumPy, and a ``DataLoader``'s own generator. Training
    then starts or continues as if there had been no test, and attached schedulers are not affected. This also holds if
    an exception or Ctrl-C (KeyboardInterrupt) ends the test; the exception is raised again. Data that hooks have stored
    elsewhere is not restored, nor are batches that were taken from an iterator that cannot be restarted. During the
    test, parameters, buffers, states, averages and copies take twice their memory.

    With several processes, all must call this function, and their losses must be equal (the mean over the processes),
    so that they stop at the same step.

    Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186, section 3.3.

    Args:
        model: The model, on its device. If it is in eval mode, the test switches it to train mode; else each submodule
            keeps its mode.
        optimizer: Any optimizer whose ``step`` accepts a closure. The ratios between the learning rates of the groups
            are kept, and :math:`\eta` is the largest rate. If all rates are 0, as at the beginning of a warm-up, the
            ratios are those of ``initial_lr``.
        loss_fn: Function of the model's output and the targets that returns the loss. None if ``forward`` is given.
        loader: Batches ``(inputs, targets)``. It is restarted when it ends.
        start: First learning rate, > 0.
        end: Last learning rate, > ``start``.
        steps: Number of optimizer steps, >= 2.
        ramp: ``"exponential"`` or ``"linear"``.
        smoothing: Coefficient :math:`\beta`, in [0, 1).
        diverges_at: Ratio at which the loss has diverged, > 1. With infinity, only a loss that is not finite ends the
            test early.
        accumulate: Number of batches per step, over which loss and gradient are averaged.
        progress: Whether to show the progress on standard error.
        device: Device to which the tensors of a batch (also in tuples, lists and dicts) are moved. By default, the
            device of the model's first parameter.
        forward: Function of the model and a batch that returns the loss, instead of ``loss_fn``, for batches that are
            not pairs.

    Returns:
        The learning rates and losses, which give the suggestions.

    Raises:
        ValueError: An argument is out of range; a group has no learning rate; ``loader`` is empty, or has too few
            batches and cannot be restarted, or its batches are not pairs and ``loss_fn`` is given; a loss has several
            elements or does not depend on the parameters; ``optimizer`` has none of the model's parameters, or they are
            not yet initialized (lazy modules).
        TypeError: Not exactly one of ``loss_fn`` and ``forward`` is given, an argument has the wrong type, or a loss is
            not a tensor.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = onepass.SGD(model.parameters(), lr=0.1)
        >>> x = torch.ones(8, 4)
        >>> loader = [(x, x.sum(1, keepdim=True))]
        >>> found = onepass.lr_find(model, optimizer, torch.nn.functional.mse_loss, loader, steps=50, progress=False)
        >>> len(found.lrs) == len(found.losses) <= 50
        True
        >>> optimizer.param_groups[0]["lr"]  # unchanged
        0.1
    """
    if not isinstance(model, nn.Module) or not hasattr(optimizer, "param_groups"):
        raise TypeError(
            "lr_find: model and optimizer must be a torch.nn.Module and an optimizer, "
            f"got a {type(model).__name__} and a {type(optimizer).__name__}"
        )
    if (loss_fn is None) == (forward is None):
        got = "neither" if loss_fn is None else "both"
        raise TypeError(f"lr_find: pass exactly one of loss_fn and forward, got {got}")
    for name, function in (("loss_fn", loss_fn), ("forward", forward)):
        if function is not None and not callable(function):
            raise TypeError(f"lr_find: {name} must be a function, got {described(function)}")
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(f"lr_find: loader must give batches, got {described(loader)}")
    numbers = {"start": start, "end": end, "smoothing": smoothing, "diverges_at": diverges_at}
    for name, value in numbers.items():
        check_number(f"lr_find: {name}", value)
    steps = whole_at_least("lr_find: steps", steps, 2)
    accumulate = whole_at_least("lr_find: accumulate", accumulate, 1)
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"lr_find: smoothing must be in [0, 1), got {smoothing}")
    if not diverges_at > 1.0:
        raise ValueError(f"lr_find: diverges_at must be > 1, got {diverges_at}")
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise ValueError(
                f"lr_find: the parameters of model must be initialized, but {name} is not: run a batch through "
                "the model"
            )
    reshard(model)
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "lr_find: optimizer must have parameters of model, but has none: it was made for another model"
        )
    lrs = _rates(start, end, steps, ramp)
    ratios = _ratios(optimizer)
    if device is None:
        device = next((p.device for p in model.parameters()), None)

    def loss_of(batch: Any) -> Tensor:
        if forward is not None:
            return _checked_loss("forward", forward(model, batch))
        assert loss_fn is not None
        inputs, targets = _pair(batch)
        return _checked_loss("loss_fn", loss_fn(model(inputs), targets))

    losses: list[float] = []
    smoothed: list[float] = []
    average, diverged = 0.0, False
    bar = Bar("lr_find", steps) if progress else None
    with contextlib.ExitStack() as stack:
        if bar is not None:
            stack.callback(bar.close)
        stack.enter_context(restored(model, optimizer, loss_fn, forward, generators=_generators(loader)))
        batches = stack.enter_context(contextlib.closing(_endless(loader)))
        if not model.training:
            model.train()
        for lr in lrs:
            taken = [_moved(next(batches), device) for _ in range(accumulate)]
            _set_rates(optimizer, lr, ratios)
            losses.append(_step(optimizer, loss_of, taken))
            average = smoothing * average + (1 - smoothing) * losses[-1]
            smoothed.append(average / (1 - smoothing ** len(losses)))
            best = min(smoothed)
            if bar is not None:
                bar.show(len(losses), f"lr {lr:.1e}, loss {smoothed[-1]:.4g}, lowest {best:.4g}")
            diverged = not math.isfinite(losses[-1]) or smoothed[-1] - best > (diverges_at - 1) * abs(best)
            if diverged:
                break
    return LRRangeTest(lrs[: len(losses)], np.array(losses), np.array(smoothed), diverged, smoothing)


def _pair(batch: Any) -> tuple[Any, Any]:
    """Return inputs and targets of a batch. A dict or a tensor of length 2 would unpack, too, but is not a pair."""
    if not isinstance(batch, Mapping | Tensor | str):
        with contextlib.suppress(TypeError, ValueError):
            inputs, targets = batch
            return inputs, targets
    size = f" of {len(batch)}" if hasattr(batch, "__len__") else ""
    raise ValueError(
        f"lr_find: loader must give pairs (inputs, targets) for loss_fn, got a {type(batch).__name__}{size}: "
        "use forward=, which computes the loss from the model and a batch"
    )


def _checked_loss(function: str, loss: Any) -> Tensor:
    """Return the loss, after checking that it is one number that autograd can differentiate."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"lr_find: {function} must return the loss as a tensor, got {described(loss)}")
    if loss.numel() != 1:
        raise ValueError(
            f"lr_find: {function} must return the loss as one number, got a tensor of shape {list(loss.shape)}"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"lr_find: {function} must return a loss that depends on a parameter that requires a gradient, got one "
            "that does not"
        )
    return loss


def _rates(start: float, end: float, steps: int, ramp: str) -> Floats:
    if not 0.0 < start < end < math.inf:
        raise ValueError(f"lr_find: start and end must satisfy 0 < start < end, got {start} and {end}")
    if ramp == "exponential":
        return np.geomspace(start, end, steps)
    if ramp == "linear":
        return np.linspace(start, end, steps)
    raise ValueError(f"lr_find: ramp must be 'exponential' or 'linear', got {ramp!r}")


def _ratios(optimizer: Optimizer) -> list[float]:
    """Return each group's learning rate relative to the largest."""
    for i, group in enumerate(optimizer.param_groups):
        if group.get("lr") is None:
            raise ValueError(
                f"lr_find: group {i} of {type(optimizer).__name__} must have a learning rate ('lr'), but has none"
            )
    for name in ("lr", "initial_lr"):
        rates = [float(group.get(name, 0.0)) for group in optimizer.param_groups]
        if max(rates) > 0:
            return [rate / max(rates) for rate in rates]
    return [1.0] * len(rates)


@torch.no_grad()
def _set_rates(optimizer: Optimizer, lr: float, ratios: list[float]) -> None:
    for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
        group["lr"] = put_number(group["lr"], float(lr * ratio))


def _step(optimizer: Optimizer, loss_of: Callable[[Any], Tensor], batches: list[Any]) -> float:
    """Step on the mean loss of these batches, and return that loss before the step."""
    seen: list[float] = []  # an optimizer with a line search calls the closure several times

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for batch in batches:
            loss = loss_of(batch) / len(batches)
            loss.backward()
            total = total.to(loss) + loss.detach()
        seen.append(total.item())
        return total

    optimizer.step(closure)  # type: ignore[arg-type]
    return seen[0]


def _endless(loader: Iterable[Any]) -> Generator[Any, None, None]:
    """Yield the batches; restart the loader whenever it ends."""
    taken = 0
    while True:
        before = taken
        for batch in loader:
            taken += 1
            yield batch
        if taken == before == 0:
            raise ValueError("lr_find: loader must have a batch, but is empty")
        if taken == before:
            raise ValueError(
                f"lr_find: loader has only {taken} batches and cannot be restarted: pass a list or a DataLoader"
            )


def _generators(loader: Any) -> list[torch.Generator]:
    """Return the random number generators of a DataLoader and its samplers, other than torch's default generator."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(holder, "generator", None) for holder in holders)
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _moved(batch: Any, device: torch.device | str | None) -> Any:
    """Return the batch with its tensors on this device."""
    if callable(getattr(batch, "to", None)):  # tensors, and objects like them
        return batch if device is None else batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_moved(value, device) for value in batch)
    return batch
