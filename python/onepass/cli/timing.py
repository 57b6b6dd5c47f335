"""The timing harness of ``python -m onepass bench`` and of the files of ``bench/``.

Contenders first make the same steps from the same start with the same gradients, and every element is compared. Then
they are timed in turn, round after round, in changing order, so that other load on the machine affects all alike. Times
are medians over the rounds, and ratios are medians of the ratios within each round.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Run: TypeAlias = Callable[[], Any]
Maker: TypeAlias = Callable[[list[Tensor]], Run]  # parameters -> a function that makes one step
Shapes: TypeAlias = Sequence[tuple[int, ...]]
Samples: TypeAlias = dict[str, list[float]]  # contender -> seconds per step, one for each round

SAMPLE = 0.01  # approximate seconds per sample: shorter steps are repeated, up to 1,000 times
QUICK_SAMPLE = 0.0005  # of a run that only checks that everything works


@dataclass
class Result:
    """The result of one comparison. The first contender is the reference of the ratios.

    Attributes:
        workload: Name of the workload.
        optimizer: Name of the optimizer.
        elements: Number of elements of all parameters.
        tensors: Number of parameters.
        samples: Seconds per step in each round, for each contender.
        moved: Bytes that the step has to move, each array counted once for every time that it must be read or written;
            0 if memory traffic is not measured.
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
        """Name of the contender that is the reference of the ratios."""
        return next(iter(self.samples))

    def seconds(self, name: str | None = None) -> float:
        """Return the median time of a contender in seconds, by default of the first."""
        return statistics.median(self.samples[name or self.first])

    def ratios(self) -> dict[str, float]:
        """Return the time of each other contender relative to the first."""
        medians = ratios(self.samples)
        del medians[self.first]
        return medians

    def spread(self, name: str | None = None) -> float:
        """Return half the interquartile range of a contender's times, relative to their median."""
        samples = self.samples[name or self.first]
        if len(samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return (high - low) / 2 / statistics.median(samples)


def ratios(samples: Samples) -> dict[str, float]:
    """Return the time of each contender relative to the first: the median of the ratios within each round."""
    first = next(iter(samples.values()))
    return {n: statistics.median(b / a for a, b in zip(first, s, strict=True)) for n, s in samples.items()}


def sample_in_turn(names: Iterable[str], rounds: int, sample: Callable[[str], float]) -> Samples:
    """Sample every contender in turn, round after round, in changing order, with the garbage collector disabled."""
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


class Clock:
    """The wall clock. A sample of a short call covers many calls, and the result is the time per call.

    Args:
        sample: Approximate seconds per sample: shorter calls are repeated, up to 1,000 times. None: SAMPLE, or
            QUICK_SAMPLE (see :func:`prepare`).
        synchronize: Function that waits until a device has done all work of the calls, if they use one.
    """

    _default = SAMPLE

    def __init__(self, sample: float | None = None, synchronize: Run | None = None) -> None:
        self.sample = self._default if sample is None else sample
        self.synchronize = synchronize

    def seconds(self, run: Run, repeats: int) -> float:
        """Return the seconds per call."""
        if self.synchronize:
            self.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        if self.synchronize:
            self.synchronize()
        return (time.perf_counter() - start) / repeats

    def repeats(self, run: Run) -> int:
        """Return the number of calls of a sample."""
        return max(1, min(1000, round(self.sample / max(self.seconds(run, 2), 1e-9))))

    def sampler(self, run: Run) -> Callable[[], float]:
        """Return a function that takes a sample and returns the seconds per call."""
        return functools.partial(self.seconds, run, self.repeats(run))


def prepare(quick: bool) -> None:
    """Prepare the process to time.

    Clocks that are created from now on take short samples by default if ``quick``. Objects that exist now are excluded
    from garbage collection, which saves 0.2 s per comparison.
    """
    Clock._default = QUICK_SAMPLE if quick else SAMPLE
    torch.optim.SGD([torch.zeros(1, requires_grad=True)]).step()  # torch's first step loads its compiler
    gc.collect()
    gc.freeze()


def time_in_turn(
    runs: dict[str, Run], rounds: int, before: Callable[[str], Any] | None = None, clock: Clock | None = None
) -> Samples:
    """Time contenders in turn.

    Args:
        runs: The timed function of each contender.
        rounds: Number of samples of each contender.
        before: Function of the contender's name that is called before each timed call and is not timed. A sample then
            is one call by the wall clock.
        clock: The clock. By default, the wall clock with samples of a hundredth of a second.

    Returns:
        Seconds per call, for each contender and round.
    """
    clock = clock or Clock()
    samplers = {} if before else {name: clock.sampler(run) for name, run in runs.items()}

    def sample(name: str) -> float:
        if before:
            before(name)
            return clock.seconds(runs[name], 1)
        return samplers[name]()

    return sample_in_turn(runs, rounds, sample)


def gradients(shapes: Shapes, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return random gradients."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def parameters(grads: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Return new parameters with the same values at every call and these gradients (shared; nothing writes them)."""
    generator = torch.Generator().manual_seed(seed)
    params: list[Tensor] = []
    for grad in grads:
        p = torch.nn.Parameter(torch.randn(grad.shape, generator=generator).to(grad.dtype))
        p.grad = grad
        params.append(p)
    return params


def check(name: str, ours: list[Tensor], theirs: list[Tensor], flips: bool = False, tolerance: float = 1e-6) -> None:
    """Compare every element after the same steps.

    Args:
        name: Name of the comparison, for the message.
        ours: Parameters that one contender has stepped.
        theirs: Parameters that the other contender has stepped.
        flips: Whether one element in a million may differ. Lion needs it: where the argument of the sign is zero up to
            rounding, either sign is right.
        tolerance: Largest difference between two elements, in addition to 8 units of rounding.

    Raises:
        AssertionError: More elements differ.
    """
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.detach(), b.detach()
        allowed = tolerance + 8 * torch.finfo(b.dtype).eps * b.abs()
        wrong = a.numel() - int(((a - b).abs() <= allowed).sum())  # a NaN counts as wrong
        if wrong > (a.numel() // 1_000_000 + 1 if flips else 0):
            raise AssertionError(f"{name}: {wrong} of {a.numel()} elements differ")
