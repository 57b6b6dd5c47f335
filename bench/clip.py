"""Clipping gradients in place: onepass.clip_grad_norm_ and clip_grad_value_ compared with torch's.

``python bench/clip.py [--quick] [--rounds N]``. The gradients are hot (the same memory in each call), or new tensors,
as after a backward pass. Restoring or making them is not timed. Where the norm is below max_norm, torch multiplies the
gradients by 1, and onepass does not write them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import onepass
import torch
from onepass.cli.timing import Result, Run, Shapes, check, gradients, parameters, time_in_turn
from torch import Tensor, nn

CLIPPED = 0.1  # max_norm relative to the norm
CLIP_VALUE = 1.0

SIZES: dict[str, tuple[Shapes, Shapes]] = {  # shapes, in full and with --quick
    "16 x 4M": ([(4 << 20,)] * 16, [(64 << 10,)] * 16),
    "1 x 16M": ([(16 << 20,)], [(64 << 10,)]),
    "200 x 1000": ([(1000,)] * 200, [(1000,)] * 20),
    "1000 x 100": ([(100,)] * 1000, [(100,)] * 100),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Clip = Callable[[list[Tensor], float], Any]


class Gradients:
    """The gradients of one contender."""

    def __init__(self, grads: list[Tensor]) -> None:
        self.wanted = grads
        self.params = parameters(grads)
        self.renew()

    def renew(self) -> None:
        """Set new gradients, as after a backward pass."""
        for p, grad in zip(self.params, self.wanted, strict=True):
            p.grad = grad.clone()

    def restore(self) -> None:
        """Restore the gradients in the same memory."""
        for found, grad in zip(self.found(), self.wanted, strict=True):
            found.copy_(grad)

    def found(self) -> list[Tensor]:
        return [p.grad for p in self.params if p.grad is not None]


class Case(NamedTuple):
    """What is measured: the function, its second argument, and the bytes that it has to move for each byte of gradient.

    ``coefficient`` multiplies the gradients; 0 if they are clamped.
    """

    name: str
    limit: float
    moved: int
    coefficient: float = 0.0

    @property
    def contenders(self) -> dict[str, Clip]:
        name = "clip_grad_norm_" if self.coefficient else "clip_grad_value_"
        return {"onepass": getattr(onepass, name), "torch": getattr(nn.utils, name)}


def cases(grads: list[Tensor]) -> list[Case]:
    norm = torch.stack([grad.double().norm() for grad in grads]).norm().item()
    return [
        Case("norm above", CLIPPED * norm, 3, CLIPPED),
        Case("norm below", norm / CLIPPED, 1, 1.0),
        Case("value", CLIP_VALUE, 2),
    ]


def compare(name: str, grads: list[Tensor], case: Case, rounds: int) -> Iterator[Result]:
    """Check that all contenders have the same results, then measure them with hot and with new gradients."""
    clips = case.contenders
    own = {contender: Gradients(grads) for contender in clips}
    for contender, clip in clips.items():
        clip(own[contender].params, case.limit)
    for contender in clips:  # on one thread, torch's float32 norm of 16M elements is 6e-4 off
        found = own["onepass"].found(), own[contender].found()
        check(f"clip, {name}: {contender}", *found, tolerance=5e-3 * case.coefficient)

    runs: dict[str, Run] = {n: functools.partial(clip, own[n].params, case.limit) for n, clip in clips.items()}
    elements = sum(map(Tensor.numel, grads))
    moved = case.moved * sum(grad.nbytes for grad in grads)
    prepare: dict[str, Callable[[str], None]] = {
        "hot": lambda contender: own[contender].restore(),
        "new": lambda contender: own[contender].renew(),
    }
    for state, before in prepare.items():
        samples = time_in_turn(runs, rounds, before)
        yield Result(f"clip: {name}, {state}", clips["torch"].__name__, elements, len(grads), samples, moved)


def measure(quick: bool, rounds: int) -> Iterator[Result]:
    """Measure clipping by norm, with a norm above and below the limit, and by value."""
    for size, shapes in SIZES.items():
        for dtype_name, dtype in DTYPES.items():
            grads = gradients(shapes[quick], dtype)
            for case in cases(grads):
                yield from compare(f"{case.name}, {size} {dtype_name}", grads, case, rounds)


if __name__ == "__main__":
    from run import alone

    alone(measure, __doc__)
