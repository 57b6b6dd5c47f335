"""Prodigy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import signatures
from .arguments import check_number, number, whole_at_least
from .base import Native
from .declared import PRODIGY_ESTIMATE, check_estimate
from .gradient_norm import is_dtensor
from .torch_operations import batches, real, steps, value_of
from .torch_private import foreach_add_, foreach_copy_, foreach_mul_

# Elements of slices that are worked on at once. Larger temporary tensors would get new pages from the system each time.
_SLICED = 1 << 19


def _step_size(group: Mapping[str, Any], step: float) -> float:
    beta1, beta2 = group["betas"]
    correction = math.sqrt(1 - beta2**step) / (1 - beta1**step) if group["use_bias_correction"] else 1.0
    return float(group["d"] * group["lr"] * correction)


def _measure(group: Mapping[str, Any], state: Mapping[str, Tensor], grad: Tensor, moved: Tensor, step: float) -> None:
    """Advance ``s`` and the tensor's shares of the estimate. ``moved``: the first parameter minus this one."""
    kept, weight, own_weight = _weights(group, step)
    s = state["s"].mul_(kept).add_(grad, alpha=own_weight)
    state["d_numerator"].mul_(kept).add_(weight * value_of((grad.double() * moved.double()).sum()))
    state["d_denom"].fill_(value_of(s.abs().sum(dtype=torch.float64)))


def _weights(group: Mapping[str, Any], step: float) -> tuple[float, float, float]:
    """Return the decay rate of the estimate, and the weights of a gradient in the numerator and in ``s``."""
    beta3 = math.sqrt(group["betas"][1]) if group.get("beta3") is None else group["beta3"]
    growth, step_size = group["d"] / group["d0"], _step_size(group, step)
    return beta3, growth * step_size, growth * (group["d"] if group["safeguard_warmup"] else step_size)


def _states_of(group: Mapping[str, Any]) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", "s", "p0") if group["slice_p"] == 1 else ("exp_avg", "exp_avg_sq")


@steps("Prodigy", _states_of, copies=("p0",), scalars=("d_numerator", "d_denom"))
def _torch_update(group: Mapping[str, Any], p: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: float) -> None:
    beta1, beta2 = group["betas"]
    d, step_size, decay = group["d"], _step_size(group, step), group["weight_decay"]
    if decay and not group["decouple"]:
        grad = grad + decay * p
    if group["slice_p"] == 1:
        _measure(group, state, grad, state["p0"] - p, step)
    grad = d * grad
    m = state["exp_avg"].lerp_(grad, 1 - beta1)
    v = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    change = step_size * m / (v.sqrt() + d * group["eps"])
    p.sub_(step_size * decay * p + change if decay and group["decouple"] else change)


def adapt(optimizer: Optimizer) -> None:
    """Estimate the distance anew, from the shares of all tensors."""
    groups = optimizer.param_groups
    rates = [number(group["lr"]) for group in groups]
    lr = max(rates)
    numerator = denominator = 0.0
    for group, own in zip(groups, rates, strict=True):
        if own <= 0:
            continue
        found = [optimizer.state[p] for p in group["params"] if p in optimizer.state]
        states = [state for state in found if "d_numerator" in state]
        numerator += _total([state["d_numerator"] for state in states]) * (lr / own)
        share = own / lr if group["safeguard_warmup"] else 1.0
        denominator += _total([state["d_denom"] for state in states]) * share
    first = groups[0]
    d_hat = number(first["d_coef"]) * numerator / denominator if denominator > 0 else math.nan
    if not math.isfinite(d_hat):
        return
    d = max(first["d"], d_hat) if first["d"] == first["d0"] else first["d"]
    d_max = max(number(first["d_max"]), d_hat)
    d = min(d_max, d * number(first["growth_rate"]))
    for group in groups:
        group.update(zip(PRODIGY_ESTIMATE, (d, d_max), strict=True))


def _total(scalars: list[Tensor]) -> float:
    """Return the sum of tensors of one element, with one copy from each GPU."""
    on_gpu: dict[torch.device, list[Tensor]] = {}
    values: list[float] = []
    for scalar in scalars:
        if scalar.is_cpu:
            values.append(scalar.item())
        else:
            on_gpu.setdefault(scalar.device, []).append(scalar)
    for own in on_gpu.values():
        values += torch.stack(own).tolist()
    return sum(values)  # not fsum, which raises for infinities of both signs


@dataclass
class _Slices:
    """Copies of every ``slice_p``-th element of parameters of one group and dtype, and of their gradients.

    They are those before the step, one tensor after the other, in the arithmetic type. All are worked on together,
    because a dozen torch operations for each would take far longer than its update.
    """

    group: dict[str, Any]
    params: list[Tensor]
    sizes: list[int]
    dtype: torch.dtype  # of new states
    values: Tensor
    grads: Tensor

    def measure(self, states: Mapping[Tensor, dict[str, Any]], factor: float, limit: float) -> None:
        """Advance the estimate after a step, in which gradients were multiplied by ``factor`` and then clamped."""
        group = {**self.group, "lr": number(self.group["lr"])}
        own = [states[p] for p in self.params]
        for state, first in zip(own, self.values.split(self.sizes), strict=True):
            if "s" not in state:
                state["s"], state["p0"] = (torch.zeros_like(first, dtype=self.dtype), first.to(self.dtype, copy=True))
        grads = (self.grads * (-factor if group.get("maximize") else factor)).clamp_(-limit, limit)
        if group["weight_decay"] and not group["decouple"]:
            grads += group["weight_decay"] * self.values
        kept, weights, own_weights = zip(*(_weights(group, float(state["step"])) for state in own), strict=True)
        moved = torch.cat([state["p0"] for state in own]) - self.values
        s = torch.cat([state["s"] for state in own]).to(grads.dtype).mul_(kept[0])
        if len(set(own_weights)) == 1:
            s.add_(grads, alpha=own_weights[0])
        else:  # with bias correction, beside parameters that have made fewer steps
            each = torch.tensor(own_weights, dtype=s.dtype, device=s.device)
            s.addcmul_(grads, each.repeat_interleave(self._lengths(), output_size=len(s)))
        foreach_copy_([state["s"] for state in own], list(s.split(self.sizes)))
        products = self._sums(grads.double() * moved.double())
        shares = [state["d_numerator"] for state in own]
        foreach_mul_(shares, kept[0])
        foreach_add_(shares, [weight * product for weight, product in zip(weights, products, strict=True)])
        for state, magnitude in zip(own, self._sums(s.abs_().double()), strict=True):
            state["d_denom"].fill_(magnitude)

    def _lengths(self) -> Tensor:
        return torch.tensor(self.sizes, device=self.values.device)

    def _sums(self, values: Tensor) -> list[float]:
        """Return the sum over each parameter's part; NaN on the device meta, where tensors have no values."""
        if values.is_meta:
            return [math.nan] * len(self.sizes)
        sums: list[float] = torch.segment_reduce(values, "sum", lengths=self._lengths(), initial=0.0).tolist()
        return sums


class Prodigy(Native, signatures.Prodigy):
    r"""Prodigy: Adam with a step size that is the estimated distance from the initial parameters to the solution.

    So no learning rate has to be chosen: ``lr`` multiplies the estimate :math:`d`; leave it at 1, with or without a
    schedule. At step :math:`t`, with the gradient :math:`g_t` (negated with ``maximize``),
    :math:`\beta_3 = \sqrt{\beta_2}` and the decay :math:`\lambda`:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) d_{t-1} g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) d_{t-1}^2 g_t^2 \\
        \theta_t &= (1 - \gamma d_{t-1} \lambda) \theta_{t-1}
                    - \gamma d_{t-1} \frac{m_t}{\sqrt{v_t} + d_{t-1} \epsilon} \\
        r_t &= \beta_3 r_{t-1} + \frac{\gamma d_{t-1}^2}{d_0} \langle g_t, \theta_0 - \theta_{t-1} \rangle \\
        s_t &= \beta_3 s_{t-1} + \frac{\gamma d_{t-1}^2}{d_0} g_t \\
        \hat d_t &= c \, r_t / \|s_t\|_1 \\
        d_t &= \max(d_{t-1}, \hat d_t)

    The product in :math:`r` and the 1-norm of :math:`s` are sums over all tensors of all groups. In each group, the key
    ``d`` is :math:`d`, and ``d_max`` is the largest :math:`\hat d`.

    Groups may have different ``lr``. Each parameter then counts as if it were measured in units of its ``lr``: with
    the largest ``lr`` :math:`\gamma` and a group's own :math:`\gamma_g`, the formulas of the group's steps and of its
    :math:`s` have :math:`\gamma_g`, and the formula of :math:`r` has :math:`\gamma`. A group with an ``lr`` of 0 does
    not count.

    16-bit parameters need a ``master``: without one, the first steps, of length :math:`d_0`, are lost in rounding, and
    the estimate does not grow.

    The package prodigyopt differs in these points:

    - Its denominator has :math:`d_t \epsilon`, which takes a second pass; the paper and this class have
      :math:`d_{t-1} \epsilon`.
    - If a tensor has no gradient, its share of :math:`r` decays, and :math:`\|s\|_1` leaves it out. In this class, both
      shares do not change.
    - With :math:`\beta_1 = 0` it multiplies the gradient by :math:`d_t`, not by :math:`d_{t-1}`.
    - It refuses groups with different ``lr``, except 0.

    Source: Mishchenko and Defazio 2024, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", arXiv:2306.06101,
    algorithm 4.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on CPUs and GPUs; torch operations step others.
            The sums of DTensors are those of the whole tensors. With ZeroRedundancyOptimizer, each process has its own
            estimate.
        lr: Factor :math:`\gamma` of the step size; a float, or a tensor of one element.
        betas: Decay rates :math:`\beta_1, \beta_2`, in [0, 1).
        beta3: Decay rate :math:`\beta_3` of the estimate, in [0, 1); None: :math:`\sqrt{\beta_2}`.
        eps: :math:`\epsilon`, which is multiplied by :math:`d` and added to the denominator.
        weight_decay: :math:`\lambda`.
        decouple: Whether the weight decay is decoupled, as in AdamW; False: it is added to the gradient, as in Adam.
        use_bias_correction: Whether :math:`\gamma` is multiplied by Adam's
            :math:`\sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`.
        safeguard_warmup: Whether :math:`s` has no :math:`\gamma`, which keeps the estimate small while a schedule warms
            up.
        d0: First estimate :math:`d_0`, above 0; the same in all groups.
        d_coef: Factor :math:`c` of the estimate; tune this instead of ``lr``. The first group's value is used.
        growth_rate: Largest factor by which :math:`d` grows in one step, at least 1. The first group's value is used.
        slice_p: Compute :math:`r` and :math:`s` from every ``slice_p``-th element of the flattened tensors, in torch
            operations, so that the states ``s`` and ``p0`` are smaller by this factor. It cannot be changed after the
            first step, and must be 1 for DTensors.
        maximize: Ascend instead of descend.
        state_dtype: dtype of the states: torch.float32, float64, bfloat16 or float16; None: the parameter's, and
            float32 for 16-bit parameters. In float16, :math:`d^2` rounds to zero as long as :math:`d` is small.

    Further arguments, documented at ``__init__``: ``master`` (see :doc:`/master_weights`), ``stochastic_rounding`` and
    ``rounding_seed`` (see :doc:`/stochastic_rounding`), and those of :doc:`/step_tail`: ``max_norm``, ``norm_type``,
    ``clip_value``, ``skip_nonfinite``, ``average``, ``copy_to``, ``zero_grad``.

    Raises:
        TypeError: A hyperparameter is not a number, or ``slice_p`` is not an integer.
        ValueError: A hyperparameter is out of range, or groups have different ``d0``; or at the step, if ``slice_p`` is
            not 1 and a parameter is a DTensor, or a state does not fit it.
        RuntimeError: At the step, if a gradient is sparse.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.Prodigy(model.parameters())
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> optimizer.param_groups[0]["d"] > 1e-6
        True
    """

    rule = "prodigy"
    torch_step = _torch_update
    copies = ("p0",)
    is_separable = False
    not_capturable = "its step size is estimated on the CPU"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as torch does. It takes the estimate of the other groups.

        Raises:
            TypeError: A hyperparameter is not a number.
            ValueError: A hyperparameter has an invalid value, or ``d0`` is not that of the other groups.
        """
        added = param_group if isinstance(param_group, dict) else {}  # torch refuses others
        check_estimate(f"Prodigy: group {len(self.param_groups)}", added)
        _check_first_estimates([*self.param_groups, {**self.defaults, **added}])
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        _check_first_estimates(state["param_groups"])
        super().__setstate__(state)

    def _counts_on_device(self, group: dict[str, Any]) -> bool:
        return bool(group.get("slice_p", 1) == 1)  # the sums are found there

    def _before_step(self) -> Callable[[], None]:
        check_estimate("Prodigy: group 0", self.param_groups[0])
        slices = list(self._slices())
        before = self._steps()

        def after() -> None:
            if self._steps() == before:
                return
            if slices and (grad_factor := self._grad_factor()) is not None:
                factor = grad_factor * (1.0 if self.last_step is None else self.last_step.coefficient)
                with torch.no_grad():
                    for each in slices:
                        each.measure(self.state, factor, math.inf if self._tail is None else self._tail.clip_value)
            adapt(self)

        return after

    def _steps(self) -> float:
        """Return the steps of the first parameter that has a gradient: they do not change if a step is skipped."""
        params = (p for group in self.param_groups for p in group.get("params", ()))
        p = next((p for p in params if getattr(p, "grad", None) is not None), None)
        return 0.0 if p is None else float(self.state.get(p, {}).get("step", 0.0))

    @torch.no_grad()
    def _slices(self) -> Iterator[_Slices]:
        if all(group.get("slice_p", 1) == 1 for group in self.param_groups):  # what lacks it is refused by the step
            return
        masters = self._master_names()
        for index, group in enumerate(self.param_groups):
            where = f"Prodigy: group {index}"
            every = whole_at_least(f"{where}: slice_p", group.get("slice_p", 1), 1)
            alike: dict[tuple[torch.dtype, torch.dtype, torch.device], list[Tensor]] = {}
            for p in group["params"] if every != 1 else ():
                if p.grad is None or p.grad.is_sparse:
                    continue
                if is_dtensor(p):
                    raise ValueError(f"{where}: slice_p must be 1 for DTensors, got {every}")
                size = -(-p.numel() * (2 if p.is_complex() else 1) // every)
                for name in ("s", "p0"):
                    held = self.state.get(p, {}).get(name)
                    if held is not None and held.shape != (size,):
                        raise ValueError(
                            f"{where}: with slice_p={every} the state {name} of a parameter of shape {tuple(p.shape)} "
                            f"must have shape {(size,)}, got {tuple(held.shape)}"
                        )
                own = p.real.dtype
                key = self._state_dtype(group, p) or own, torch.promote_types(own, torch.float32), p.device
                alike.setdefault(key, []).append(p)
            for (dtype, wide, _), all_params in alike.items():
                for params in batches(all_params, every * _SLICED, Tensor.numel):
                    values = [_every(self._master_or_param(p, masters), every) for p in params]
                    grads = [_every(p.grad, every).to(wide) for p in params if p.grad is not None]
                    sizes = list(map(len, values))
                    yield _Slices(group, params, sizes, dtype, torch.cat(values).to(wide), torch.cat(grads))


def _check_first_estimates(groups: Sequence[Mapping[str, Any]]) -> None:
    """Check that all groups have the same ``d0``, by which the shares of their tensors in the estimate are divided."""
    first: float | None = None
    for index, group in enumerate(groups):
        if "d0" not in group:  # which the step refuses
            continue
        check_number(f"Prodigy: group {index}: d0", group["d0"])
        d0 = number(group["d0"])
        if first is None:
            first = d0
        elif d0 != first:
            raise ValueError(
                f"Prodigy: d0 must be the same in all groups, got {d0} in group {index} and {first} before it"
            )


def _every(x: Tensor, every: int) -> Tensor:
    """Return every so-many-th element of a tensor, of a complex one as pairs of real numbers."""
    if x.is_contiguous() and not (x.is_complex() or x.is_neg()):  # a view, by one operation
        return x.as_strided((-(-x.numel() // every),), (every,))
    return real(x.resolve_neg()).reshape(-1)[::every]
