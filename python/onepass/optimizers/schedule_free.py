"""The base of the Schedule-Free optimizers: two points for each parameter, one for training and one for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Native
from .master import master_of, write_master
from .torch_operations import wide

TRAIN_POINT = "y"  # the state that holds the point to train at, or its master, while the parameter is the other point


class ScheduleFree(Native):
    """An optimizer whose parameters are at the point ``y`` for training, and at ``x`` for evaluation.

    The state ``z`` is the base optimizer's point, and ``y = (1 - momentum) * z + momentum * x``.
    """

    copies = ("z",)

    @torch.no_grad()
    def eval(self) -> None:
        """Set the parameters to ``x``, the weighted mean of all ``z``. Call this before evaluating or saving the model.

        The states keep ``y``, the point for training, until :meth:`train`. A second call does nothing.
        """
        for p, state, master, momentum in self._moved_to(train_mode=False):
            state[TRAIN_POINT] = p.detach().clone() if master is None else master_of(p, state, master)
            p.copy_(_evaluated(state, momentum))

    def _state_to_save(self, p: Tensor, state: Mapping[str, Any]) -> Mapping[str, Any]:
        if isinstance(state, Mapping) and TRAIN_POINT in state:
            return state  # low bits of the point for training, which eval() has replaced
        return super()._state_to_save(p, state)

    @torch.no_grad()
    def train(self) -> None:
        """Restore the parameters to the point for training, bit for bit. A second call does nothing.

        Elements that were changed after :meth:`eval`, for example by loading a model, are taken as the new point for
        evaluation, from which the point for training is computed.
        """
        for p, state, master, momentum in self._moved_to(train_mode=True):
            y = _between(wide(p), state["z"], 1 - momentum)
            if (kept := state.pop(TRAIN_POINT, None)) is not None:
                x = _evaluated({**state, TRAIN_POINT: kept}, momentum).to(p.dtype)
                y = torch.where((x == p) | (x.isnan() & p.isnan()), kept.to(y.dtype), y)
            if master is None:
                p.copy_(y)
            else:
                write_master(p, state, master, y)

    def _moved_to(self, train_mode: bool) -> Iterator[tuple[Tensor, dict[str, Any], str | None, float]]:
        """Set the mode of all groups, and yield the parameters that have to be set to the other point.

        Yields:
            Parameter, its state, the name of its master (None: it has none), and its momentum. Before the first step,
            both points are the same.
        """
        masters = self._master_names()
        momenta = [self._momentum(number, group) for number, group in enumerate(self.param_groups)]
        for group, momentum in zip(self.param_groups, momenta, strict=True):
            if group.get("train_mode", True) == train_mode:
                continue
            for p in group["params"]:
                state = self.state.get(p, {})
                if state.get("z") is not None:
                    yield p, state, masters.get(p), momentum
            group["train_mode"] = train_mode

    def _check_types(self, values: Mapping[str, Any], group: int | None = None) -> None:
        super()._check_types(values, group)
        if group is not None and ("betas" in values or "momentum" in values):  # others have the default
            self._momentum(group, values)

    def _momentum(self, number: int, group: Mapping[str, Any]) -> float:
        """Return the momentum of group ``number``, or raise ValueError if it is out of the constructor's range."""
        name, momentum = ("momentum", group["momentum"]) if "momentum" in group else ("betas[0]", group["betas"][0])
        if not 0.0 < momentum < 1.0:
            raise ValueError(
                f"{type(self).__name__}: group {number}: {name} must be above 0 and below 1, got {float(momentum)}"
            )
        return float(momentum)

    def _before_step(self) -> None:
        for group in self.param_groups:
            if group.get("train_mode", True):
                continue
            if all(self.state.get(p, {}).get("z") is None for p in group["params"]):
                group["train_mode"] = True  # before the first step all points are the same
                continue
            raise RuntimeError(
                f"{type(self).__name__}: eval() has moved the parameters to the point to evaluate at: call "
                "optimizer.train() before the forward pass of a training step"
            )


def _between(start: Tensor, end: Tensor, weight: float) -> Tensor:
    # Three operations, because torch.lerp is rounded differently by device, processor and number of threads.
    return start + (end.to(start.dtype) - start) * weight


def _evaluated(state: Mapping[str, Any], momentum: float) -> Tensor:
    """Return the point to evaluate at: x, with y = (1 - momentum) * z + momentum * x."""
    return _between(wide(state[TRAIN_POINT]), state["z"], 1 - 1 / momentum)


def move(
    p: Tensor, change: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any], lr: float, step: float
) -> None:
    """Move both points in torch operations. ``change``: of z, if ``lr`` were 1."""
    momentum = group["momentum"] if "momentum" in group else group["betas"][0]
    lr_max = max(float(state["lr_max"]), lr)  # a NaN stays, as in the kernels
    weight = step ** group["r"] * lr_max ** group["weight_lr_power"]
    weight_sum = float(state["weight_sum"]) + weight
    c = weight / weight_sum if weight_sum > 0 else 0.0
    state["lr_max"].fill_(lr_max)
    state["weight_sum"].fill_(weight_sum)
    z = state["z"]
    p.lerp_(z, c).sub_((1 - momentum * (1 - c)) * lr * change)
    z.sub_(lr * change)


def warmup(group: Mapping[str, Any], step: float) -> float:
    """Return the factor of the learning rate while it warms up."""
    return min(1.0, step / group["warmup_steps"]) if group["warmup_steps"] else 1.0
