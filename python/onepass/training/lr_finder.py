"""The learning rate range test."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..optimizers.arguments import check_number, described, put_number, whole
from .figure import axes_to_fill, figure_of
from .progress import Bar
from .restoring import restored

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

Floats: TypeAlias = "NDArray[np.float64]"

# The ways to read a rate off the curve, as a table and a picture tell them.
METHODS = {
    "steepest": "where the smoothed loss falls fastest",
    "minimum": "a tenth of where it is lowest",
    "valley": "in the middle of its longest fall",
}


@dataclass(frozen=True, eq=False)
class LRRangeTest:
    """The losses that a learning rate range test has seen, and the rates that they suggest.

    Attributes:
        lrs: The learning rate of each step, of the group with the largest one. float64, increasing.
        losses: The loss that each step was computed from. float64; what the step at ``lrs[i]`` has done shows in
            ``losses[i + 1]``. The last may be NaN or infinite.
        smoothed: The bias-corrected exponential running average of ``losses``.
        diverged: Whether the test ended because of the loss, before all its steps.
        smoothing: What one step of the running average keeps of it.

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
        r"""A learning rate to train with, read off the smoothed loss :math:`s` over the rates :math:`\eta`.

        The steps before the :math:`1 / (1 - \text{smoothing})`-th are left out: their averages are over fewer losses
        than those to come, and so fall and rise with the noise. So is a loss that is not finite.

        There is no suggestion where nothing can be read off the curve: the smoothed loss has not fallen, was lowest at
        the last rate, so that none was too large, or fell by less than 7 standard deviations of the batches' noise.
        Losses of nothing but such noise fall so far, from the first to the lowest, in less than one test of a hundred.
        The noise of a loss is told by how far it is from the middle of its neighbours (a root mean square, up to the
        lowest :math:`s`); the running average has :math:`\sqrt{(1 - \beta) / (1 + \beta)}` of it.

        Args:
            method: ``"steepest"``: the :math:`\eta` up to the minimum of :math:`s` at which
                :math:`ds / d \log \eta` (central differences) is lowest. ``"minimum"``: a tenth of the :math:`\eta` at
                which :math:`s` is lowest. ``"valley"``: of the longest subsequence of :math:`s`, not necessarily of
                neighbours, in which every value is below the one before, let :math:`n` be the length and :math:`e` the
                end; the middle of the :math:`n` steps that end at :math:`e`, as fastai suggests it to within two steps
                (``fastai.callback.schedule.valley``). It heeds single leaps the least.

        Raises:
            ValueError: There is no such method, or nothing to suggest. The message says why.
        """
        if method not in METHODS:
            raise ValueError(f"Invalid method: {method!r}; it must be one of {tuple(METHODS)}")
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
        """How many steps at the beginning are left out."""
        return round(1 / (1 - self.smoothing)) - 1

    @property
    def _curve(self) -> tuple[Floats, Floats]:
        """The rates and smoothed losses that suggestions are read off."""
        finite = np.isfinite(self.smoothed)
        return self.lrs[finite][self._settled :], self.smoothed[finite][self._settled :]

    def _why_none(self) -> str:
        """Why there is nothing to suggest; empty if there is something."""
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
            return f"the loss fell by {fall:.2g}, where its noise is {noise:.2g}: raise accumulate, smoothing or steps"
        return ""

    def _noise(self, end: int) -> float:
        """The standard deviation of the smoothed loss that is the batches', from the losses up to the step ``end``."""
        losses = self.losses[self._settled : end + 1]
        if len(losses) < 5:
            losses = self.losses[np.isfinite(self.losses)]
        bends = np.diff(losses, 2)  # of independent losses, these have 6 times the variance; a trend has hardly any
        variance = np.mean(bends**2) / 6 if len(bends) else 0.0
        return math.sqrt(variance * (1 - self.smoothing) / (1 + self.smoothing))

    def suggestions(self) -> dict[str, float]:
        """What each method suggests; empty if there is nothing to suggest (:meth:`suggestion`)."""
        try:
            return {method: self.suggestion(method) for method in METHODS}  # type: ignore[arg-type]
        except ValueError:
            return {}

    def table(self) -> str:
        """A row for each step: its number, learning rate, loss and smoothed loss."""
        rows = zip(self.lrs, self.losses, self.smoothed, strict=True)
        lines = [f"{i:4}  {lr:12.4e}  {loss:12.6g}  {average:13.6g}" for i, (lr, loss, average) in enumerate(rows, 1)]
        return "\n".join([f"{'step':>4}  {'lr':>12}  {'loss':>12}  {'smoothed loss':>13}", *lines])

    def __str__(self) -> str:
        end = "; there the loss diverged" if self.diverged else ""
        lines = [f"LR range test: {len(self.lrs)} steps, lr {self.lrs[0]:.2e} to {self.lrs[-1]:.2e}{end}"]
        if why := self._why_none():
            return "\n".join([*lines, f"  no suggestion: {why}"])
        return "\n".join(
            [*lines, *(f"  {name:8}  {lr:.2e}  {METHODS[name]}" for name, lr in self.suggestions().items())]
        )

    def plot(self, ax: Axes | None = None, path: str | PathLike[str] | None = None) -> Figure:
        """Draws the losses over the learning rate, with the suggestions.

        Args:
            ax: Axes to draw into. By default a figure is made.
            path: File to save the figure to; its suffix tells the format (.svg, .pdf, ...), PNG without one. With
                neither a path nor axes the figure is shown, by :func:`matplotlib.pyplot.show`.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is missing: ``pip install onepass[plots]``.
        """
        finite = np.isfinite(self.smoothed)
        # Single batches may be far above the smoothed loss where it diverges; they are cut off.
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
    """The end and the length of the longest decreasing subsequence; of several, the one that ends first."""
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
    r"""Trains for a few steps, each at a higher learning rate than the one before, to see at which ones the loss falls.

    Step :math:`i` of :math:`n`, from 0, is one of the optimizer at the rate

    .. math::
        \eta_i = \eta_\text{start} (\eta_\text{end} / \eta_\text{start})^{i / (n-1)} \quad\text{(exponential)}, \qquad
        \eta_i = \eta_\text{start} + (\eta_\text{end} - \eta_\text{start}) \, i / (n-1) \quad\text{(linear)}

    and its loss :math:`l_i` enters a running average with the smoothing :math:`\beta`, corrected for its bias:

    .. math::
        m_i = \beta m_{i-1} + (1 - \beta) l_i, \qquad s_i = m_i / (1 - \beta^{i+1})

    The test ends early, having diverged, when :math:`l_i` is not finite, or :math:`s_i` has risen above the lowest
    :math:`s` so far, :math:`s^*`, by more than ``(diverges_at - 1)`` :math:`|s^*|`.

    Afterwards everything is as it was before, to the bit and in place: parameters and buffers, gradients, the
    optimizer's groups and states, attributes of modules (train or eval mode), torch's, Python's and NumPy's random
    numbers, and a ``DataLoader``'s own generator. So training goes on, or begins, as if there had been no test, and
    schedulers that are attached do not notice it. That holds, too, when an exception or Ctrl-C (KeyboardInterrupt)
    ends the test, which are passed on. What is not put back: what hooks note elsewhere, and the batches taken from
    an iterator that cannot begin anew. Meanwhile, parameters, buffers and states take their memory twice.

    Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186, section 3.3.

    Args:
        model: The model, on its device. One that is in eval mode is trained in train mode; else each submodule keeps
            its mode.
        optimizer: Any optimizer, of torch, of onepass or another, whose ``step`` takes a closure. Groups keep the
            ratios of their learning rates, and :math:`\eta` is that of the largest. (If all are 0, as at the beginning
            of a warm-up, ``initial_lr`` counts.)
        loss_fn: Called with the model's output and the batch's second part. None if ``forward`` is given.
        loader: Batches ``(inputs, targets)``; begun anew whenever it ends.
        start: The first learning rate, above 0.
        end: The last learning rate, above ``start``.
        steps: Optimizer steps, at least 2.
        ramp: ``"exponential"`` or ``"linear"``.
        smoothing: :math:`\beta`, in [0, 1).
        diverges_at: Above 1; infinity for a test that only a loss that is not finite ends.
        accumulate: Batches of a step, over which loss and gradient are averaged.
        progress: Whether standard error shows the progress.
        device: Where tensors of a batch (in tuples, lists and dicts, too) are moved to; by default, where the model's
            first parameter is.
        forward: Computes the loss of a batch that is no such pair, from the model and the batch, in place of
            ``loss_fn``.

    Returns:
        The rates and losses, with what they suggest.

    Raises:
        ValueError: An argument is out of its range; a group has no learning rate; ``loader`` has no batch, or not
            enough and cannot begin anew, or for ``loss_fn`` batches that are no pairs; a loss is of several elements,
            or does not depend on the parameters; ``optimizer`` has none of the model's parameters, or they are still to
            be initialised by a first batch (lazy modules).
        TypeError: Not exactly one of ``loss_fn`` and ``forward`` is given, an argument is of another type, or a loss is
            no tensor.

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
            "lr_find(model, optimizer, ...) takes a torch.nn.Module and an optimizer, "
            f"got a {type(model).__name__} and a {type(optimizer).__name__}"
        )
    if (loss_fn is None) == (forward is None):
        raise TypeError("lr_find takes either loss_fn or forward")
    for name, function in (("loss_fn", loss_fn), ("forward", forward)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, got {described(function)}")
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(f"loader must give batches, got {described(loader)}")
    numbers = {"start": start, "end": end, "smoothing": smoothing, "diverges_at": diverges_at}
    for name, value in numbers.items():
        check_number(name, value)
    steps, accumulate = whole("steps", steps), whole("accumulate", accumulate)
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"Invalid smoothing: {smoothing}; it must lie in [0, 1)")
    if not diverges_at > 1.0:
        raise ValueError(f"Invalid diverges_at: {diverges_at}; it must be above 1")
    if accumulate < 1:
        raise ValueError(f"Invalid accumulate: {accumulate}; it must be at least 1")
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise ValueError(f"parameter {name} is to be initialised by the first batch: run one through the model")
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("optimizer has none of the model's parameters: it was made for another model")
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
    """The two parts of a batch. A dict and a tensor of two would be taken apart, too, into what is not meant."""
    if not isinstance(batch, Mapping | Tensor | str):
        with contextlib.suppress(TypeError, ValueError):
            inputs, targets = batch
            return inputs, targets
    size = f" of {len(batch)}" if hasattr(batch, "__len__") else ""
    raise ValueError(
        f"loader must give pairs (inputs, targets) for loss_fn, got a {type(batch).__name__}{size}: "
        "use forward=, which computes the loss from the model and a batch"
    )


def _checked_loss(function: str, loss: Any) -> Tensor:
    """A loss, which must be one number that autograd can differentiate."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"{function} must return the loss as a tensor, got {described(loss)}")
    if loss.numel() != 1:
        raise ValueError(f"{function} must return the loss as one number, got a tensor of shape {list(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(f"{function} returned a loss that does not depend on a parameter that requires a gradient")
    return loss


def _rates(start: float, end: float, steps: int, ramp: str) -> Floats:
    if not 0.0 < start < end < math.inf:
        raise ValueError(f"Invalid start and end: {start}, {end}; it must be 0 < start < end")
    if steps < 2:
        raise ValueError(f"Invalid steps: {steps}; there must be at least 2")
    if ramp == "exponential":
        return np.geomspace(start, end, steps)
    if ramp == "linear":
        return np.linspace(start, end, steps)
    raise ValueError(f"Invalid ramp: {ramp!r}; it must be 'exponential' or 'linear'")


def _ratios(optimizer: Optimizer) -> list[float]:
    """Each group's learning rate in relation to the largest."""
    for i, group in enumerate(optimizer.param_groups):
        if group.get("lr") is None:
            raise ValueError(f"group {i} of {type(optimizer).__name__} has no learning rate ('lr') to set")
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
    """Makes a step on the mean loss of these batches, and returns what that was before."""
    seen: list[float] = []  # an optimizer that searches a line evaluates it several times

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
    """The batches, over and over."""
    taken = 0
    while True:
        before = taken
        for batch in loader:
            taken += 1
            yield batch
        if taken == before == 0:
            raise ValueError("loader is empty: it has no batch to train on")
        if taken == before:
            raise ValueError(f"loader has only {taken} batches, and cannot begin anew: give a list or a DataLoader")


def _generators(loader: Any) -> list[torch.Generator]:
    """What a DataLoader and its samplers draw from, if it is not torch's default generator."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(holder, "generator", None) for holder in holders)
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _moved(batch: Any, device: torch.device | str | None) -> Any:
    """The batch with its tensors on this device."""
    if callable(getattr(batch, "to", None)):  # tensors, and what others have made like them
        return batch if device is None else batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_moved(value, device) for value in batch)
    return batch
