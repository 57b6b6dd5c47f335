"""The tail of a training step: unscaling, clipping, the step, the average of the weights, zero_grad.

``python bench/tail.py [--quick] [--rounds N]``. The whole tail is measured first, and then each part as torch does it.
The parts show the memory traffic: each of them passes over the same memory again, and only the step is the optimizer's.

The tail is that of training in mixed precision: gradients multiplied by GradScaler's scale, clip_grad_norm_, AdamW, an
exponential average by AveragedModel, and zero_grad. A second workload also makes a bfloat16 copy of the parameters for
the next forward pass. Gradients are new tensors each time, as after a backward pass; making them is not timed.

The scale is undone in one of two ways. "unscale_" is the documented way: GradScaler.unscale_, clip_grad_norm_,
GradScaler.step. In the other way the step unscales, as with GradScaler if nothing is clipped: the limit of the norm is
multiplied by the scale, found_inf is derived from the norm, and the optimizer has grad_scale and found_inf. onepass and
torch's fused form support this; torch's default does not, and is measured in the documented way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import onepass
import torch
from onepass.cli.timing import Result, Run, Samples, Shapes, check, gradients, parameters, time_in_turn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SCALE = 2.0**16  # GradScaler's initial scale; a power of two, so scaling does not round
MAX_NORM = 1.0
DECAY = 0.999
CHECKED_TAILS = 2  # for each kind

SIZES: dict[str, tuple[Shapes, Shapes]] = {  # shapes, in full and with --quick
    "16 x 4M": ([(4 << 20,)] * 16, [(64 << 10,)] * 16),
    "1000 x 100": ([(100,)] * 1000, [(100,)] * 100),
}

Make = Callable[[list[Tensor]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "onepass": functools.partial(onepass.AdamW, lr=1e-3),
    "fused": functools.partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "default": functools.partial(torch.optim.AdamW, lr=1e-3, foreach=False, fused=False),
}
SCALED_STEP = ("onepass", "fused")  # their steps can unscale


class Tail:
    """One contender: its parameters, and everything that is done with them after the backward pass."""

    def __init__(self, optimizer: str, grads: list[Tensor]) -> None:
        self.grads = grads
        self.params = parameters(grads)
        for p in self.params:
            p.grad = None  # so that it is not copied with the model
        self.model = nn.ParameterList(self.params)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        self.copies = [p.detach().bfloat16() for p in self.params]
        self.optimizer = OPTIMIZERS[optimizer](self.params)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        self.scaler.scale(torch.zeros(()))  # initialises the scale

    def lend(self) -> None:
        """Set new gradients, multiplied by the scale, as after a backward pass."""
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad * SCALE

    def whole(self, scaled_step: bool, copy: bool) -> None:
        if scaled_step:
            norm = nn.utils.clip_grad_norm_(self.params, MAX_NORM * SCALE)
            self.step_on_scaled(~norm.isfinite())
        else:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.params, MAX_NORM)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.update_average()
        if copy:
            self.copy()
        self.optimizer.zero_grad()

    def step_on_scaled(self, found_inf: Tensor) -> None:
        """Make the step as GradScaler does when the optimizer unscales."""
        optimizer: Any = self.optimizer
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(SCALE), found_inf.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf

    def update_average(self) -> None:
        self.average.update_parameters(self.model)

    @torch.no_grad()
    def copy(self) -> None:
        torch._foreach_copy_(self.copies, self.params)

    def agree(self, name: str, first: Tail) -> None:
        """Compare all results of the tail with the first contender's."""
        check(f"tail, {name}: parameters", first.params, self.params)
        check(f"tail, {name}: average", list(first.average.parameters()), list(self.average.parameters()))
        check(f"tail, {name}: copies", first.copies, self.copies)  # to 8 roundings of bfloat16


class Part(NamedTuple):
    """A part of the tail in torch's implementation."""

    run: Run
    wanted: Callable[[], list[Tensor]]  # called before the part: the expected result
    found: Callable[[], list[Tensor]]  # called after the part: the result
    moved: int  # bytes per element that this part alone has to move
    tolerance: float = 0.0
    uses_up: bool = True  # whether it changes the gradients, so that each run needs new ones


def parts_of(tail: Tail) -> dict[str, Part]:
    """Return all parts except the step."""
    params, grads = tail.params, tail.grads
    norm = torch.stack([grad.double().norm() for grad in grads]).norm()
    clipped = float(MAX_NORM / norm)

    def lent() -> list[Tensor]:
        return [p.grad for p in params if p.grad is not None]

    def unscale() -> None:
        torch._amp_foreach_non_finite_check_and_unscale_(lent(), torch.zeros(()), torch.tensor(1 / SCALE))

    def averages() -> list[Tensor]:
        return list(tail.average.parameters())

    def next_averages() -> list[Tensor]:
        return [DECAY * a.detach() + (1 - DECAY) * p.detach() for a, p in zip(averages(), params, strict=True)]

    return {
        "unscale_": Part(unscale, lambda: grads, lent, moved=8),
        "clip_grad_norm_": Part(
            lambda: nn.utils.clip_grad_norm_(params, MAX_NORM),
            lambda: [grad * clipped for grad in grads],
            lent,
            moved=12,
            tolerance=1e-3 * clipped,  # on one thread, torch's float32 norm of 4M elements is 1e-4 off
        ),
        "average": Part(tail.update_average, next_averages, averages, moved=12, tolerance=1e-6, uses_up=False),
        "bfloat16 copy": Part(
            tail.copy, lambda: [p.detach().bfloat16() for p in params], lambda: tail.copies, moved=6, uses_up=False
        ),
        "zero_grad in place": Part(
            lambda: tail.optimizer.zero_grad(set_to_none=False),
            lambda: [torch.zeros_like(grad) for grad in grads],
            lent,
            moved=4,
            uses_up=False,
        ),
        "zero_grad": Part(tail.optimizer.zero_grad, list, lent, moved=0),
    }


def measure(quick: bool, rounds: int) -> Iterator[Result]:
    """Measure the whole tail, then its parts, for a set of large tensors and one of small ones."""
    for size, shapes in SIZES.items():
        grads = gradients(shapes[quick])
        yield from whole_tails(size, grads, rounds)
        yield from parts(size, grads, rounds)


def whole_tails(size: str, grads: list[Tensor], rounds: int) -> Iterator[Result]:
    """Measure all contenders, with and without the copy, and their steps alone."""
    tails = {name: Tail(name, grads) for name in OPTIMIZERS}
    contenders: list[dict[str, Run]] = [
        {n: functools.partial(t.whole, scaled and n in SCALED_STEP, copy) for n, t in tails.items()}
        for scaled, copy in ((False, False), (True, False), (True, True))
    ]
    documented, scaled_step, with_copy = contenders
    for name, tail in tails.items():
        for run in contenders:
            for _ in range(CHECKED_TAILS):
                tail.lend()
                run[name]()
        tail.lend()
        tail.optimizer.step()
    for name, tail in tails.items():
        tail.agree(name, tails["onepass"])

    def result(part: str, runs: dict[str, Run], moved: int) -> Result:
        samples = time_in_turn(runs, rounds, before=lambda name: tails[name].lend())
        return result_of(part, size, grads, samples, moved)

    # Gradients are read twice: the norm must be known before the first element is stepped.
    yield result("whole", scaled_step, moved=4 + 28 + 8)
    yield result("whole, bfloat16 copy", with_copy, moved=4 + 28 + 8 + 2)
    yield result("whole, unscale_", documented, moved=4 + 28 + 8)
    yield result("step", {name: tail.optimizer.step for name, tail in tails.items()}, moved=28)


def parts(size: str, grads: list[Tensor], rounds: int) -> Iterator[Result]:
    """Measure each part of torch's tail except the step."""
    tail = Tail("default", grads)
    for _ in range(2):  # the first average is a copy
        tail.lend()
        tail.whole(scaled_step=False, copy=True)
    for name, part in parts_of(tail).items():
        tail.lend()
        wanted = part.wanted()
        part.run()
        check(f"tail, {name}", part.found(), wanted, tolerance=part.tolerance)
        del wanted
        samples = time_in_turn({"torch": part.run}, rounds, (lambda _: tail.lend()) if part.uses_up else None)
        yield result_of(name, size, grads, samples, part.moved)


def result_of(part: str, size: str, grads: list[Tensor], samples: Samples, moved: int) -> Result:
    elements = sum(map(Tensor.numel, grads))
    return Result(f"tail: {part}, {size}", "AdamW", elements, len(grads), samples, moved * elements)


if __name__ == "__main__":
    from run import alone

    alone(measure, __doc__)
