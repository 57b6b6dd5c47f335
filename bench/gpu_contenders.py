"""What gpu.py compares: optimizers, and the tail of a training step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import onepass
import torch
from gpu_device import Device
from onepass.cli import bench, limit
from onepass.cli.timing import Run
from onepass.swa_utils import AveragedModel
from tail import DECAY, MAX_NORM
from torch import Tensor, nn
from torch.optim import Optimizer, swa_utils

Make = Callable[..., Optimizer]  # its argument: parameters or groups


class Contender:
    """Parameters, and an optimizer that steps them.

    Attributes:
        run: Makes one step.
    """

    def __init__(self, make: Make, params: list[Tensor]) -> None:
        self.params = params
        self.optimizer = make(params)
        self.run: Run = self.optimizer.step

    def lend(self, step: int) -> None:
        """Set the gradients of a step that is checked. Here they are the same at every step."""

    def results(self) -> dict[str, list[Tensor]]:
        """Return what is compared with the others, by name."""
        return {"parameters": self.params}

    def arrays(self) -> list[list[Tensor]]:
        """Return the arrays of a step: for each parameter its gradient, and the arrays that are updated."""
        return limit.arrays_of(self.optimizer.step, self.params)

    def moved(self) -> int:
        """Return the bytes that a step has to move."""
        return limit.moved_by(self.arrays())

    def held(self) -> int:
        """Return the bytes of all that a step uses."""
        return sum(array.nbytes for row in self.arrays() for array in row)


class Tail(Contender):
    """The tail of a training step: clipping by the norm of all gradients, AdamW, an average of the weights.

    torch's clipping writes to ``.grad``, so each contender has gradients of its own. Each checked step has new ones,
    whose norm differs from that of the step before. Without clipping, the averages of AdamW would differ.

    The gradients of timed steps are not renewed. torch multiplies them in each step, also by a coefficient of 1, so the
    work is the same.
    """

    def __init__(self, make: Make, params: list[Tensor]) -> None:
        self.given = [p.grad for p in params if p.grad is not None]
        for p in params:
            p.grad = None  # so that it is not copied with the model
        self.model = nn.ParameterList(params)
        self.average = self.new_average()
        super().__init__(make, params)
        for p, grad in zip(params, torch._foreach_mul(self.given, 1.0), strict=True):
            p.grad = grad
        self.own = [p.grad for p in params if p.grad is not None]
        self.run = self.step

    def new_average(self) -> swa_utils.AveragedModel:
        raise NotImplementedError

    def step(self) -> None:
        """Do all that follows the backward pass."""
        raise NotImplementedError

    def lend(self, step: int) -> None:
        torch._foreach_copy_(self.own, self.given)
        torch._foreach_mul_(self.own, 1.0 + 3.0 * (step % 2))

    def averages(self) -> list[Tensor]:
        return [p.detach() for p in self.average.parameters()]

    def results(self) -> dict[str, list[Tensor]]:
        return {"parameters": self.params, "averages": self.averages()}

    def moved(self) -> int:
        # Gradients are read twice: the norm must be known before the first element is stepped.
        return super().moved() + sum(grad.nbytes for grad in self.own) + 2 * sum(a.nbytes for a in self.averages())

    def held(self) -> int:
        return super().held() + sum(a.nbytes for a in self.averages())


class OnepassTail(Tail):
    """All of it in one step."""

    def __init__(self, make: Make, params: list[Tensor]) -> None:
        def make_with_tail(params: Any) -> Optimizer:
            return make(params, max_norm=MAX_NORM, average=self.average)

        super().__init__(make_with_tail, params)

    def new_average(self) -> AveragedModel:
        return AveragedModel(self.model, decay=DECAY)

    def step(self) -> None:
        self.optimizer.step()
        self.average.update_parameters(self.model)


class TorchTail(Tail):
    """torch's way: a pass over memory for each part."""

    def new_average(self) -> swa_utils.AveragedModel:
        return swa_utils.AveragedModel(self.model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY))

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.params, MAX_NORM, foreach=True)
        self.optimizer.step()
        self.average.update_parameters(self.model)


class CapturableTorchTail(TorchTail):
    """The same without torch's AveragedModel, which copies its count to the GPU in each step and waits for it."""

    def __init__(self, make: Make, params: list[Tensor]) -> None:
        super().__init__(make, params)
        self.moved_average = False
        self.averaged = self.averages()
        self.current = [p.detach() for p in params]
        self.update = swa_utils.get_ema_multi_avg_fn(DECAY)

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.params, MAX_NORM, foreach=True)
        self.optimizer.step()
        if self.moved_average:
            self.update(self.averaged, self.current, 1)
        else:  # the first average is a copy
            torch._foreach_copy_(self.averaged, self.current)
            self.moved_average = True


class ForeachLion(Optimizer):
    """Lion (Chen et al. 2023) in torch's foreach operations, because torch has no Lion."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            params = group["params"]
            grads = [p.grad for p in params]
            for p in params:
                if p not in self.state:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            averages = [self.state[p]["exp_avg"] for p in params]
            beta1, beta2 = group["betas"]
            updates = torch._foreach_lerp(averages, grads, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])
            torch._foreach_lerp_(averages, grads, 1 - beta2)


# The foreach forms of optimizers that torch does not have.
FOREACH: dict[type[Optimizer], type[Optimizer]] = {onepass.Lion: ForeachLion}


def optimizers(subject: bench.Subject, dtype: torch.dtype, device: Device) -> dict[str, Make]:
    """Return each contender's constructor by its name, ours first: torch's foreach form and, if there is one, fused."""
    found = {name: make for name, make in subject.optimizers().items() if name != "default"}
    if "fused" in found and not takes_fused(found["fused"], dtype, device):
        del found["fused"]
    if (foreach := FOREACH.get(subject.ours)) is not None:
        found["foreach"] = functools.partial(foreach, **subject.arguments)
    return found


def takes_fused(make: Make, dtype: torch.dtype, device: Device) -> bool:
    """Return whether torch's class has a fused form for such parameters on this device."""
    if not device.is_gpu and dtype in (torch.bfloat16, torch.float16):
        return False  # SGD's skips elements on a CPU: pytorch issue 191763
    p = nn.Parameter(torch.ones(1, device=device.torch, dtype=dtype))
    p.grad = torch.ones_like(p)
    try:
        make([p]).step()
    except RuntimeError:
        return False
    return True


def in_groups(make: Make) -> Make:
    """Return the same constructor with one group per parameter."""
    return lambda params: make([{"params": [p]} for p in params])
