"""Formats: step times with 16-bit parameters, gradients and states.

``bfloat16`` and ``float16``: everything in that format. ``mixed``: bfloat16 parameters and gradients with float32
states. ``states``: float32 parameters and gradients with bfloat16 states. The limit is a loop over arrays of the same
sizes in bytes (:mod:`onepass.cli.limit`).

8-bit states are in memory.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from onepass.cli import limit
from onepass.cli.bench import CHECKED_STEPS, SUBJECTS, Subject, stepped
from onepass.cli.timing import Result, Run, gradients, parameters, time_in_turn
from torch import Tensor
from torch.optim import Optimizer

PROBED = ("SGD", "AdamW", "Lion", "RMSprop")


class Formats(NamedTuple):
    name: str
    dtype: torch.dtype  # of parameters and gradients
    state_dtype: torch.dtype | None = None  # None: as the parameters


ALL = (
    Formats("float32", torch.float32),
    Formats("bfloat16", torch.bfloat16),
    Formats("float16", torch.float16),
    Formats("mixed", torch.bfloat16, torch.float32),
    Formats("states", torch.float32, torch.bfloat16),
)


def measure(quick: bool, rounds: int) -> Iterator[Result | str]:
    shapes: list[tuple[int, ...]] = [(64 << 10 if quick else 4 << 20,)] * 16
    for formats in ALL:
        for subject in SUBJECTS:
            if subject.name in PROBED:
                left_out: list[str] = []
                yield compare(subject, formats, shapes, rounds, left_out)
                yield from (f"{formats.name}: {why}" for why in left_out)


def compare(
    subject: Subject, formats: Formats, shapes: list[tuple[int, ...]], rounds: int, left_out: list[str]
) -> Result:
    """Compare one format with torch's step in that format, or, if torch has no such states, with ours in float32."""
    if formats.name != "float32":
        # In 16 bits a small learning rate would change hardly any parameter. Contenders that round elsewhere (torch's
        # default rounds after every operation) may differ by some roundings of an update.
        lr = 2.0**-3 if "lr" in subject.arguments else 1.0
        tolerance = 32 * lr * torch.finfo(torch.bfloat16).eps
        subject = subject._replace(arguments={**subject.arguments, "lr": lr}, tolerance=tolerance)
    # No gradient is near 0: in float16 its square would be 0, by which torch's default would divide.
    grads = [torch.where(g < 0, g - 0.5, g + 0.5) for g in gradients(shapes, formats.dtype)]
    if formats.state_dtype is None:
        made = stepped(subject, subject.makers(), grads, left_out)
    else:
        made = with_states(subject, formats.state_dtype, grads)
    runs = {name: run for name, (_, run) in made.items()}
    rows = limit.arrays_of(runs["onepass"], made["onepass"][0])
    moved = limit.moved_by(rows)
    samples = limit.fastest(time_in_turn(runs | limit.runs(as_floats(rows)), rounds))
    return Result(f"formats: {formats.name}", subject.name, sum(map(Tensor.numel, grads)), len(grads), samples, moved)


def with_states(subject: Subject, state_dtype: torch.dtype, grads: list[Tensor]) -> dict[str, tuple[list[Tensor], Run]]:
    """Return ours with states of that format, and ours with the same values all in float32."""

    def maker(params: list[Tensor]) -> Run:
        make: Callable[..., Optimizer] = subject.ours
        return make(params, **subject.arguments, state_dtype=state_dtype).step

    made = stepped(subject, {"onepass": maker}, grads)
    exact = parameters([grad.float() for grad in grads])
    with torch.no_grad():
        for copy, p in zip(exact, parameters(grads), strict=True):
            copy.copy_(p)
    step = subject.ours(exact, **subject.arguments).step
    for _ in range(CHECKED_STEPS):
        step()
    subject.check("all in float32", made["onepass"][0], [p.to(grads[0].dtype) for p in exact])
    return {**made, "all in float32": (exact, step)}


def as_floats(rows: list[list[Tensor]]) -> list[list[Tensor]]:
    """Return float32 arrays of zeros with the same bytes, each as large as the row's smallest; larger ones in parts."""
    floats = []
    for read, *updated in rows:
        part = min(array.nbytes for array in (read, *updated))
        reads = read.nbytes // part
        updates = sum(array.nbytes for array in updated) // part
        for k in range(reads):
            floats.append([torch.zeros(part // 4) for _ in range(1 + len(range(k, updates, reads)))])
    return floats


if __name__ == "__main__":
    from run import alone

    alone(measure, __doc__)
