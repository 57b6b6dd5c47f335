"""The memory limit of a step: the time of the fastest of several plain loops that read and write the same arrays.

The loops (:mod:`onepass._traffic`) differ in prefetch and in the order of the arrays, because the fastest choice
depends on the processor. All are timed in turn with the contenders. The limit is the loop with the lowest median.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _traffic
from .timing import Run, Samples

LIMIT = "limit"
_PREFIX = f"{LIMIT}: "


def arrays_of(step: Run, params: list[Tensor]) -> list[list[Tensor]]:
    """Return the arrays that an optimizer's step reads and updates.

    Args:
        step: The bound method of an optimizer that has stepped.
        params: Its parameters.

    Returns:
        One list per parameter: the gradient, which is read, and the flat arrays that are updated.
    """
    state = step.__self__.state  # type: ignore[attr-defined]
    rows = []
    for p in params:
        assert p.grad is not None
        arrays = [value for value in state[p].values() if value.dim() > 0]  # not the step counter and other numbers
        rows.append([array.view(-1) for array in (p.grad, p.detach(), *arrays)])
    return rows


def measured_of(step: Run, params: list[Tensor], names: Sequence[str]) -> list[list[Tensor]]:
    """Return the arrays that an optimizer's step reads in a pass before the update, one list per parameter.

    Args:
        step: The bound method of an optimizer that has stepped.
        params: Its parameters.
        names: ``param``, ``grad`` and names of states.
    """
    state = step.__self__.state  # type: ignore[attr-defined]
    all_arrays = [{**state[p], "param": p.detach(), "grad": p.grad} for p in params]
    return [[arrays[name].view(-1) for name in names] for arrays in all_arrays]


def moved_by(rows: list[list[Tensor]], measured: Sequence[list[Tensor]] = ()) -> int:
    """Return the bytes that a step moves.

    Each array of ``measured`` is read. Then each array of the rows is read, and all but the first of each are written.
    """
    in_update = sum(2 * sum(array.nbytes for array in row) - row[0].nbytes for row in rows)
    return in_update + sum(array.nbytes for arrays in measured for array in arrays)


def runs(rows: list[list[Tensor]], measured: Sequence[list[Tensor]] = ()) -> dict[str, Run]:
    """Return a function for each loop that runs it on these arrays of float32; :func:`fastest` uses the names."""

    def run(loop: str) -> Run:
        return lambda: _traffic.add(loop, rows, torch.get_num_threads(), list(measured))

    return {_PREFIX + loop: run(loop) for loop in _traffic.loops()}


def fastest(samples: Samples) -> Samples:
    """Return the samples, with all loops replaced by ``limit``: the samples of the loop with the lowest median."""
    others = {name: times for name, times in samples.items() if not name.startswith(_PREFIX)}
    loops = [times for name, times in samples.items() if name.startswith(_PREFIX)]
    return {**others, LIMIT: min(loops, key=statistics.median)} if loops else others
