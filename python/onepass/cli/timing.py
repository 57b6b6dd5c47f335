"""Fair comparisons, for ``python -m onepass bench`` and the files of ``bench/``.

Contenders first make the same steps from the same start with the same gradients, and every element is compared. Only
then are they timed: in turn, round after round, in changing order, so that what else the machine does hits all alike.
Figures are medians over the rounds, ratios medians of the rounds' ratios.
"""

from __future__ import annotations

import gc
import statistics
import time
import timeit
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Run: TypeAlias = Callable[[], Any]
Maker: TypeAlias = Callable[[list[Tensor]], Run]  # parameters -> what does one step
Shapes: TypeAlias = Sequence[tuple[int, ...]]
Samples: TypeAlias = dict[str, list[float]]  # contender -> seconds a step, one for each round

SAMPLE = 0.01  # seconds that a sample takes about: shorter steps are repeated, up to 1,000 times


@dataclass
class Result:
    """One comparison. The first contender is the one that the others are measured by.

    Attributes:
        workload: What was done.
        optimizer: Which optimizer did it.
        elements: Of the parameters, all together.
        tensors: How many parameters there are.
        samples: Seconds that a step took in each round, for each contender.
        moved: Bytes that the step has to move, each array counted once for every time that it must be read or written;
            0 where memory is not the question.
        question: The file of ``bench/`` that this belongs to.
    """

    workload: str
    optimizer: str
    elements: int
    tensors: int
    samples: Samples
    moved: int = 0
    question: str = ""

    @property
    def first(self) -> str:
        """The name of the contender that the others are measured by."""
        return next(iter(self.samples))

    def seconds(self, name: str | None = None) -> float:
        """The median time of a contender, the first by default."""
        return statistics.median(self.samples[name or self.first])

    def ratios(self) -> dict[str, float]:
        """How many times as long as the first each of the others takes."""
        medians = ratios(self.samples)
        del medians[self.first]
        return medians

    def spread(self, name: str | None = None) -> float:
        """Half the distance between the quartiles of a contender's times, over their median."""
        samples = self.samples[name or self.first]
        if len(samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return (high - low) / 2 / statistics.median(samples)


def ratios(samples: Samples) -> dict[str, float]:
    """How many times as long as the first each takes: the medians of the rounds' ratios."""
    first = next(iter(samples.values()))
    return {n: statistics.median(b / a for a, b in zip(first, s, strict=True)) for n, s in samples.items()}


def sample_in_turn(names: Iterable[str], rounds: int, sample: Callable[[str], float]) -> Samples:
    """A sample of every contender in turn, round after round, in changing order; without the garbage collector."""
    samples: Samples = {name: [] for name in names}
    order = list(samples)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order:
                samples[name].append(sample(name))
            order.append(order.pop(0))
    finally:
        gc.enable()
    return samples


def time_in_turn(runs: dict[str, Run], rounds: int, before: Callable[[str], Any] | None = None) -> Samples:
    """Times contenders in turn.

    Args:
        runs: What each contender does.
        rounds: How often each is sampled.
        before: What comes ahead of each timed call, and is not timed; it is given the contender's name. Without it, a
            sample is of as many calls as take about a hundredth of a second.

    Returns:
        Seconds a call, for each contender and round.
    """
    repeats = {name: 1 if before else _repeats(run) for name, run in runs.items()}

    def sample(name: str) -> float:
        if before:
            before(name)
        return timeit.timeit(runs[name], number=repeats[name]) / repeats[name]

    return sample_in_turn(runs, rounds, sample)


def _repeats(run: Run) -> int:
    start = time.perf_counter()
    run()
    return max(1, min(1000, round(SAMPLE / max(time.perf_counter() - start, 1e-9))))


def gradients(shapes: Shapes, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random gradients."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def parameters(grads: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Fresh parameters, the same at every call, with these gradients (shared, as nothing writes to them)."""
    generator = torch.Generator().manual_seed(seed)
    params: list[Tensor] = []
    for grad in grads:
        p = torch.nn.Parameter(torch.randn(grad.shape, generator=generator).to(grad.dtype))
        p.grad = grad
        params.append(p)
    return params


def check(name: str, ours: list[Tensor], theirs: list[Tensor], flips: bool = False, tolerance: float = 1e-6) -> None:
    """Compares every element after the same steps.

    Args:
        name: What is compared, for the message.
        ours: Parameters that one contender has stepped.
        theirs: Those of the other.
        flips: Whether one element in a million may differ. So it is with Lion: where the sign's argument is zero but
            for rounding, the sign is open.
        tolerance: What may lie between two elements beside 8 units of rounding.

    Raises:
        AssertionError: More of them differ.
    """
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.detach(), b.detach()
        allowed = tolerance + 8 * torch.finfo(b.dtype).eps * b.abs()
        wrong = a.numel() - int(((a - b).abs() <= allowed).sum())  # a NaN is wrong, too
        if wrong > (a.numel() // 1_000_000 + 1 if flips else 0):
            raise AssertionError(f"{name}: {wrong} of {a.numel()} elements differ")
