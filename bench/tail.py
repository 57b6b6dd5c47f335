"""The tail of a training step: unscaling, clipping, the step, the average of the weights, copies, zeroed gradients.

``python bench/tail.py [--quick] [--rounds N]``. The whole tail is measured first, then steps with one argument against
the bare step, and then each part as torch does it. The parts show the memory traffic: each of them passes over the same
memory again, and only the step is the optimizer's.

The tail is that of training in mixed precision: gradients multiplied by GradScaler's scale, clipping by norm, AdamW,
an exponential average by AveragedModel. A second workload also makes a bfloat16 copy of the parameters for the next
forward pass and zeroes the gradients in place. Gradients are new tensors each time, as after a backward pass, except
where they are zeroed in place; making or filling them is not timed.

Contenders:

- "onepass": all of it in one call of ``step()``, by the arguments ``max_norm``, ``average``, ``copy_to``,
  ``zero_grad``.
- "fused": torch's best way. The step unscales, as with GradScaler if nothing is clipped: the limit of the norm is
  multiplied by the scale, found_inf is derived from the norm, and the optimizer has grad_scale and found_inf.
- "default": torch's documented way: GradScaler.unscale_, clip_grad_norm_, GradScaler.step, by torch's default AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import onepass
import torch
from onepass.cli.timing import Result, Run, Samples, Shapes, check, gradients, parameters, time_in_turn
from onepass.swa_utils import AveragedModel
from torch import Tensor, nn
from torch.optim import Optimizer

SCALE = 2.0**16  # GradScaler's initial scale; a power of two, so scaling does not round
MAX_NORM = 1.0
DECAY = 0.999
CHECKED_TAILS = 2  # for each kind

SIZES: dict[str, tuple[Shapes, Shapes]] = {  # shapes, in full and with --quick
    "16 x 4M": ([(4 << 20,)] * 16, [(64 << 10,)] * 16),
    "1000 x 100": ([(100,)] * 1000, [(100,)] * 100),
}


class Tail:
    """One contender: its parameters, and everything that is done with them after the backward pass.

    Args:
        grads: The gradients, without the scale.
        more: Whether the tail also makes the bfloat16 copy, and zeroes the gradients in place.
    """

    def __init__(self, grads: list[Tensor], more: bool) -> None:
        self.grads = grads
        self.more = more
        self.params = parameters(grads)
        for p in self.params:
            p.grad = None  # so that it is not copied with the model
        self.model = nn.ParameterList(self.params)
        self.copies = [p.detach().bfloat16() for p in self.params]
        self.average = self.new_average()
        self.optimizer = self.new_optimizer()
        self.static = [torch.empty_like(grad) for grad in grads] if more else []

    def new_average(self) -> torch.optim.swa_utils.AveragedModel:
        update = torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY)
        return torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=update)

    def new_optimizer(self) -> Optimizer:
        raise NotImplementedError

    def lend(self) -> None:
        """Set new gradients, multiplied by the scale, as after a backward pass."""
        if self.more:
            for p, grad, static in zip(self.params, self.grads, self.static, strict=True):
                p.grad = torch.mul(grad, SCALE, out=static)
        else:
            for p, grad in zip(self.params, self.grads, strict=True):
                p.grad = grad * SCALE

    def run(self) -> None:
        """Do all that follows the backward pass."""
        self.clip_and_step()
        self.average.update_parameters(self.model)
        self.copy_and_zero()

    def clip_and_step(self) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def copy_and_zero(self) -> None:
        if self.more:
            torch._foreach_copy_(self.copies, self.params)
        self.optimizer.zero_grad(set_to_none=not self.more)

    def agree(self, name: str, first: Tail) -> None:
        """Compare all results of the tail with the first contender's."""
        check(f"tail, {name}: parameters", first.params, self.params)
        check(f"tail, {name}: average", list(first.average.parameters()), list(self.average.parameters()))
        if self.more:
            check(f"tail, {name}: copies", first.copies, self.copies)  # to 8 roundings of bfloat16
            assert not any(p.grad is None or p.grad.count_nonzero() for p in self.params)


class OnepassTail(Tail):
    def new_average(self) -> AveragedModel:
        return AveragedModel(self.model, decay=DECAY)

    def new_optimizer(self) -> Optimizer:
        more: dict[str, Any] = {"copy_to": self.copies, "zero_grad": True} if self.more else {}
        assert isinstance(self.average, AveragedModel)
        return onepass.AdamW(self.params, lr=1e-3, max_norm=MAX_NORM, skip_nonfinite=True, average=self.average, **more)

    def clip_and_step(self) -> None:
        optimizer: Any = self.optimizer
        optimizer.grad_scale = torch.tensor(SCALE)
        optimizer.step()
        del optimizer.grad_scale

    def copy_and_zero(self) -> None:
        if not self.more:
            self.optimizer.zero_grad()


class FusedTail(Tail):
    def new_optimizer(self) -> Optimizer:
        return torch.optim.AdamW(self.params, lr=1e-3, fused=True)

    def clip_and_step(self) -> None:
        norm = nn.utils.clip_grad_norm_(self.params, MAX_NORM * SCALE)
        optimizer: Any = self.optimizer
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(SCALE), (~norm.isfinite()).float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf


class DefaultTail(Tail):
    def new_optimizer(self) -> Optimizer:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        self.scaler.scale(torch.zeros(()))  # initializes the scale
        return torch.optim.AdamW(self.params, lr=1e-3, foreach=False, fused=False)

    def clip_and_step(self) -> None:
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()


CONTENDERS: dict[str, type[Tail]] = {"onepass": OnepassTail, "fused": FusedTail, "default": DefaultTail}


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
        "average": Part(
            lambda: tail.average.update_parameters(tail.model),
            next_averages,
            averages,
            moved=12,
            tolerance=1e-6,
            uses_up=False,
        ),
        "bfloat16 copy": Part(
            lambda: torch._foreach_copy_(tail.copies, params),
            lambda: [p.detach().bfloat16() for p in params],
            lambda: tail.copies,
            moved=6,
            uses_up=False,
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
    """Measure the whole tail, steps with one argument, and torch's parts, for large tensors and for small ones."""
    for size, shapes in SIZES.items():
        grads = gradients(shapes[quick])
        # Gradients are read twice: the norm must be known before the first element is stepped.
        yield whole(size, "whole", grads, rounds, more=False, moved=4 + 28 + 8)
        yield whole(size, "whole, bfloat16 copy, zeroed in place", grads, rounds, more=True, moved=4 + 28 + 8 + 2 + 4)
        yield from one_argument(size, grads, rounds)
        yield from parts(size, grads, rounds)


def whole(size: str, name: str, grads: list[Tensor], rounds: int, more: bool, moved: int) -> Result:
    """Measure the whole tail of all contenders."""
    tails = {contender: cls(grads, more) for contender, cls in CONTENDERS.items()}
    for tail in tails.values():
        for _ in range(CHECKED_TAILS):
            tail.lend()
            tail.run()
    for contender, tail in tails.items():
        tail.agree(contender, tails["onepass"])
    runs = {contender: tail.run for contender, tail in tails.items()}
    samples = time_in_turn(runs, rounds, before=lambda contender: tails[contender].lend())
    return result_of(name, size, grads, samples, moved)


def one_argument(size: str, grads: list[Tensor], rounds: int) -> Iterator[Result]:
    """Measure steps with one argument against the bare step."""
    bare_params, params = parameters(grads), parameters(grads)
    bare = onepass.AdamW(bare_params, lr=1e-3)
    for name, arguments, moved in (
        ("max_norm", {"max_norm": 1e9}, 32),
        ("average", {"average": AveragedModel(nn.ParameterList(params), decay=DECAY)}, 36),
    ):
        optimizer = onepass.AdamW(params, lr=1e-3, **arguments)
        for each in (bare, optimizer):
            each.step()
        check(f"tail, {name}", bare_params, params)
        samples = time_in_turn({f"with {name}": optimizer.step, "bare": bare.step}, rounds)
        yield result_of(f"step with {name}", size, grads, samples, moved)
        for p, q in zip(params, bare_params, strict=True):
            p.data.copy_(q.data)
        bare = onepass.AdamW(bare_params, lr=1e-3)


def parts(size: str, grads: list[Tensor], rounds: int) -> Iterator[Result]:
    """Measure each part of torch's tail except the step."""
    tail = DefaultTail(grads, more=True)
    for _ in range(2):  # the first average is a copy
        tail.lend()
        tail.run()
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
