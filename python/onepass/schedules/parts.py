"""The parts of schedules."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from .schedule import Schedule

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "exponential",
    "function",
    "geometric",
    "hard_restarts",
    "inverse_sqrt",
    "linear",
    "multistep",
    "one_cycle",
    "polynomial",
    "restarts",
    "sqrt",
    "step",
    "warmup",
    "wsd",
]


@dataclass(frozen=True, repr=False)
class _Timed(Schedule):
    """A part with a given number of steps."""

    steps: int

    def _left(self, t: int) -> float:
        """Return the fraction of the steps that is left, from 1 to 0; 0 if there are no steps."""
        return (self.steps - t) / self.steps if self.steps else 0.0

    def _done(self, t: int) -> float:
        """Return the fraction of the steps that is done, from 0 to 1; 1 if there are no steps."""
        return t / self.steps if self.steps else 1.0


def _mix(start: float, end: float, left: float, done: float) -> float:
    """Return ``left * start + done * end`` for weights with sum 1: exact at both ends, and never outside them."""
    return start + (end - start) * done if done < left else end + (start - end) * left


def _wave(start: float, end: float, turns: float) -> float:
    """Return a cosine wave that is ``start`` after whole turns and ``end`` half a turn later."""
    height = math.cos(2.0 * math.pi * turns)
    return _mix(start, end, (1.0 + height) / 2.0, (1.0 - height) / 2.0)


@dataclass(frozen=True, repr=False)
class constant(Schedule):
    """A constant value.

    Args:
        steps: Number of steps; None: without end, so that no part can follow.
        value: The value.

    Raises:
        TypeError: ``steps`` is not an integer, or ``value`` is not a finite number.
        ValueError: ``steps`` is negative.

    Example:
        >>> from onepass.schedules import constant
        >>> schedule = constant(3, value=0.5)
        >>> [round(schedule(t), 3) for t in range(3)]
        [0.5, 0.5, 0.5]
    """

    steps: int | None = None
    value: float = 1.0

    def _at(self, t: int) -> float:
        return self.value


@dataclass(frozen=True, repr=False)
class linear(_Timed):
    r"""A straight line: :math:`start + (end - start) \, t / steps`.

    Args:
        steps: Number of steps from start to end.
        start: The value at t = 0.
        end: The value at t = steps.

    Raises:
        TypeError: ``steps`` is not an integer, or another argument is not a finite number.
        ValueError: ``steps`` is negative.

    Example:
        >>> from onepass.schedules import linear
        >>> schedule = linear(4, end=0.2)
        >>> [round(schedule(t), 3) for t in range(5)]
        [1.0, 0.8, 0.6, 0.4, 0.2]
    """

    start: float = 1.0
    end: float = 0.0

    def _at(self, t: int) -> float:
        return _mix(self.start, self.end, self._left(t), self._done(t))


@dataclass(frozen=True, repr=False)
class warmup(_Timed):
    r"""A straight line up to 1: :math:`start + (1 - start) \, t / steps` (Goyal et al. 2017, arXiv:1706.02677).

    Args:
        steps: Number of steps from start to 1.
        start: The value at t = 0.

    Raises:
        TypeError: ``steps`` is not an integer, or another argument is not a finite number.
        ValueError: ``steps`` is negative.

    Example:
        >>> from onepass.schedules import warmup
        >>> schedule = warmup(4)
        >>> [round(schedule(t), 3) for t in range(5)]
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    start: float = 0.0

    def _at(self, t: int) -> float:
        return _mix(self.start, 1.0, self._left(t), self._done(t))


@dataclass(frozen=True, repr=False)
class cosine(_Timed):
    r"""Half a cosine wave: :math:`end + (start - end) \, (1 + \cos(2 \pi \cdot cycles \cdot t / steps)) / 2`.

    Source: Loshchilov and Hutter 2017 (arXiv:1608.03983), without restarts.

    Args:
        steps: Number of steps from the first value to the last.
        start: The value at t = 0.
        end: The value after half a wave: by default, at t = steps.
        cycles: Number of waves; 0.5 is half a wave.

    Raises:
        TypeError: ``steps`` is not an integer, or another argument is not a finite number.
        ValueError: ``steps`` is negative.

    Example:
        >>> from onepass.schedules import cosine
        >>> schedule = cosine(4)
        >>> [round(schedule(t), 3) for t in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
    """

    start: float = 1.0
    end: float = 0.0
    cycles: float = 0.5

    def _at(self, t: int) -> float:
        return _wave(self.start, self.end, self.cycles * self._done(t))


@dataclass(frozen=True, repr=False)
class polynomial(_Timed):
    r"""Polynomial decay: :math:`end + (start - end) \, (1 - t / steps)^{power}`.

    Args:
        steps: Number of steps from start to end.
        power: The exponent, > 0.
        start: The value at t = 0.
        end: The value at t = steps.

    Raises:
        TypeError: ``steps`` is not an integer, or another argument is not a finite number.
        ValueError: ``steps`` is negative, or ``power`` is not > 0.

    Example:
        >>> from onepass.schedules import polynomial
        >>> schedule = polynomial(4, power=2.0)
        >>> [round(schedule(t), 3) for t in range(5)]
        [1.0, 0.562, 0.25, 0.062, 0.0]
    """

    power: float = 1.0
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.power > 0.0, "power", "> 0")

    def _at(self, t: int) -> float:
        left = math.pow(self._left(t), self.power)
        return _mix(self.start, self.end, left, 1.0 - left)


@dataclass(frozen=True, repr=False)
class sqrt(_Timed):
    r"""The "1-sqrt" cooldown: :math:`start + (end - start) \sqrt{t / steps}` (Hägele et al. 2024, arXiv:2405.18392).

    Args:
        steps: Number of steps from start to end.
        start: The value at t = 0.
        end: The value at t = steps.

    Raises:
        TypeError: ``steps`` is not an integer, or another argument is not a finite number.
        ValueError: ``steps`` is negative.

    Example:
        >>> from onepass.schedules import sqrt
        >>> schedule = sqrt(4)
        >>> [round(schedule(t), 3) for t in range(5)]
        [1.0, 0.5, 0.293, 0.134, 0.0]
    """

    start: float = 1.0
    end: float = 0.0

    def _at(self, t: int) -> float:
        done = math.sqrt(self._done(t))
        return _mix(self.start, self.end, 1.0 - done, done)


@dataclass(frozen=True, repr=False)
class geometric(_Timed):
    r"""A straight line on a logarithmic axis: :math:`start \, (end / start)^{t / steps}`.

    Args:
        steps: Number of steps from start to end.
        start: The value at t = 0, > 0.
        end: The value at t = steps, > 0.

    Raises:
        TypeError: ``steps`` is not an integer, or another argument is not a finite number.
        ValueError: ``steps`` is negative, or ``start`` or ``end`` is not > 0.

    Example:
        >>> from onepass.schedules import geometric
        >>> schedule = geometric(2, end=0.01)
        >>> [round(schedule(t), 3) for t in range(3)]
        [1.0, 0.1, 0.01]
    """

    start: float = 1.0
    end: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.start > 0.0, "start", "> 0")
        self._require(self.end > 0.0, "end", "> 0")

    def _at(self, t: int) -> float:
        return math.pow(self.start, self._left(t)) * math.pow(self.end, self._done(t))


def _require_gamma(schedule: exponential | step | multistep) -> None:
    schedule._require(0.0 < schedule.gamma <= 1.0, "gamma", "> 0 and <= 1")


@dataclass(frozen=True, repr=False)
class exponential(Schedule):
    r"""Exponential decay: :math:`gamma^t`, without end.

    Args:
        gamma: The factor per step, > 0 and <= 1.

    Raises:
        TypeError: ``gamma`` is not a finite number.
        ValueError: ``gamma`` is not in (0, 1].

    Example:
        >>> from onepass.schedules import exponential
        >>> schedule = exponential(0.5)
        >>> [round(schedule(t), 3) for t in range(4)]
        [1.0, 0.5, 0.25, 0.125]
    """

    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_gamma(self)

    def _at(self, t: int) -> float:
        return math.pow(self.gamma, t)


@dataclass(frozen=True, repr=False)
class step(Schedule):
    r"""Step decay: :math:`gamma^{\lfloor t / every \rfloor}`, without end.

    Args:
        every: Number of steps between two changes, at least 1.
        gamma: The factor of each change, > 0 and <= 1.

    Raises:
        TypeError: ``every`` is not an integer, or ``gamma`` is not a finite number.
        ValueError: ``every`` is less than 1, or ``gamma`` is not in (0, 1].

    Example:
        >>> from onepass.schedules import step
        >>> schedule = step(2, gamma=0.5)
        >>> [round(schedule(t), 3) for t in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    every: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.every > 0, "every", ">= 1")
        _require_gamma(self)

    def _at(self, t: int) -> float:
        return math.pow(self.gamma, t // self.every)


@dataclass(frozen=True, repr=False)
class multistep(Schedule):
    r"""Step decay at given milestones: :math:`gamma^k` from the k-th milestone on, without end.

    Args:
        milestones: The steps at which the value changes, in ascending order.
        gamma: The factor of each change, > 0 and <= 1.

    Raises:
        TypeError: ``milestones`` are not integers, or ``gamma`` is not a finite number.
        ValueError: ``milestones`` are negative or not in ascending order, or ``gamma`` is not in (0, 1].

    Example:
        >>> from onepass.schedules import multistep
        >>> schedule = multistep([2, 3], gamma=0.5)
        >>> [round(schedule(t), 3) for t in range(5)]
        [1.0, 1.0, 0.5, 0.25, 0.25]
    """

    milestones: tuple[int, ...]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_gamma(self)

    def _at(self, t: int) -> float:
        return math.pow(self.gamma, bisect_right(self.milestones, t))


@dataclass(frozen=True, repr=False)
class inverse_sqrt(Schedule):
    r"""Inverse square root decay: :math:`1 / \sqrt{1 + t / timescale}`, without end.

    After ``warmup(n)``, with timescale n, it is the schedule of Vaswani et al. 2017 (arXiv:1706.03762): proportional to
    the inverse square root of the number of all steps.

    Args:
        timescale: Number of steps, at least 1. The value is 1/2 at t = 3 * timescale.

    Raises:
        TypeError: ``timescale`` is not an integer.
        ValueError: ``timescale`` is less than 1.

    Example:
        >>> from onepass.schedules import inverse_sqrt
        >>> schedule = inverse_sqrt(4)
        >>> [round(schedule(t), 3) for t in range(5)]
        [1.0, 0.894, 0.816, 0.756, 0.707]
    """

    timescale: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.timescale > 0, "timescale", ">= 1")

    def _at(self, t: int) -> float:
        return 1.0 / math.sqrt((t + self.timescale) / self.timescale)


@dataclass(frozen=True, repr=False)
class restarts(Schedule):
    r"""Cosine decay with restarts, without end (SGDR: Loshchilov and Hutter 2017, arXiv:1608.03983).

    :math:`end + (start - end) \, (1 + \cos(\pi \, t_i / T_i)) / 2`, where :math:`T_i = period \cdot mult^i` is the
    number of steps of the i-th cycle and :math:`t_i` is the step within it.

    Args:
        period: Number of steps of the first cycle (torch's T_0), at least 1.
        mult: Ratio of the lengths of a cycle and the one before it (torch's T_mult), at least 1.
        start: The value at the beginning of a cycle.
        end: The value at the end of a cycle.

    Raises:
        TypeError: ``period`` or ``mult`` is not an integer, or another argument is not a finite number.
        ValueError: ``period`` or ``mult`` is less than 1.

    Example:
        >>> from onepass.schedules import restarts
        >>> schedule = restarts(2, mult=2)
        >>> [round(schedule(t), 3) for t in range(7)]
        [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 1.0]
    """

    period: int
    mult: int = 1
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.period > 0, "period", ">= 1")
        self._require(self.mult > 0, "mult", ">= 1")

    def _at(self, t: int) -> float:
        period = self.period
        if self.mult == 1:
            t %= period
        while t >= period:
            t -= period
            period *= self.mult
        return _wave(self.start, self.end, 0.5 * t / period)


@dataclass(frozen=True, repr=False)
class hard_restarts(_Timed):
    r"""Cosine decay with a given number of restarts, in cycles of equal length.

    :math:`end + (start - end) \, (1 + \cos(\pi \, (cycles \cdot t / steps \bmod 1))) / 2`, and ``end`` at t = steps.

    Args:
        steps: Number of steps of all cycles together. The length of a cycle may be fractional.
        cycles: Number of cycles, at least 1.
        start: The value at the beginning of a cycle.
        end: The value at the end of a cycle.

    Raises:
        TypeError: ``steps`` or ``cycles`` is not an integer, or another argument is not a finite number.
        ValueError: ``steps`` is negative, or ``cycles`` is less than 1.

    Example:
        >>> from onepass.schedules import hard_restarts
        >>> schedule = hard_restarts(4, cycles=2)
        >>> [round(schedule(t), 3) for t in range(5)]
        [1.0, 0.5, 1.0, 0.5, 0.0]
    """

    cycles: int = 1
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.cycles > 0, "cycles", ">= 1")

    def _at(self, t: int) -> float:
        if t == self.steps:
            return self.end
        # In integers, because a rounded remainder could miss the restart.
        return _wave(self.start, self.end, 0.5 * (self.cycles * t % self.steps) / self.steps)


@dataclass(frozen=True, repr=False)
class one_cycle(_Timed):
    r"""One cycle: a rise to 1 and a fall, each half a cosine wave (Smith and Topin 2018, arXiv:1708.07120).

    As in ``torch.optim.lr_scheduler.OneCycleLR``, the value is 1 at t = :math:`peak \cdot steps - 1` (which may be
    fractional), and ``end`` at t = steps - 1.

    Args:
        steps: Total number of steps, at least 1.
        peak: Fraction of the steps in which the value rises, in [0, 1] (torch's pct_start).
        start: The value at t = 0 (torch's 1 / div_factor).
        end: The value at t = steps - 1 (torch's 1 / (div_factor * final_div_factor)).

    Raises:
        TypeError: ``steps`` is not an integer, or another argument is not a finite number.
        ValueError: ``steps`` is less than 1, or ``peak`` is not in [0, 1].

    Example:
        >>> from onepass.schedules import one_cycle
        >>> schedule = one_cycle(10, peak=0.3)
        >>> [round(schedule(t), 3) for t in range(10)]
        [0.04, 0.52, 1.0, 0.95, 0.812, 0.611, 0.389, 0.188, 0.05, 0.0]
    """

    peak: float = 0.3
    start: float = 1 / 25
    end: float = 1 / 25 / 1e4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.steps > 0, "steps", ">= 1")
        self._require(0.0 <= self.peak <= 1.0, "peak", "in [0, 1]")

    def _at(self, t: int) -> float:
        last = self.steps - 1
        top = self.peak * self.steps - 1.0
        t = min(t, last)
        if t <= top:
            return _wave(self.start, 1.0, 0.5 * (t / top if top else 1.0))
        return _wave(1.0, self.end, 0.5 * (t - top) / (last - top))


@dataclass(frozen=True, repr=False)
class function(Schedule):
    """A schedule from a function.

    Its ``repr`` contains the function's name; :func:`parse` does not read it. Like functions, it is pickled by that
    name.

    Args:
        f: Returns the value at a step. It must depend on the step only.
        steps: The step from which on the value is constant; None: without end.

    Raises:
        TypeError: ``f`` is not callable, or ``steps`` is not an integer.
        ValueError: ``steps`` is negative.

    Example:
        >>> from onepass.schedules import function
        >>> schedule = function(lambda t: 1 / (t + 1))
        >>> [round(schedule(t), 3) for t in range(4)]
        [1.0, 0.5, 0.333, 0.25]
    """

    f: Callable[[int], float]
    steps: int | None = None

    def _at(self, t: int) -> float:
        return float(self.f(t))

    def __repr__(self) -> str:
        # Not the function's repr: its address differs in the process that resumes a run.
        named = self.f if hasattr(self.f, "__qualname__") else type(self.f)
        steps = "" if self.steps is None else f", steps={self.steps}"
        return f"{self._name()}({named.__module__}.{named.__qualname__}{steps})"


def wsd(warmup_steps: int, stable_steps: int, decay_steps: int, end: float = 0.0) -> Schedule:
    """Warm-up, stable, decay: ``warmup(..) >> constant(..) >> linear(.., end=end)`` (Hu et al. 2024, arXiv:2404.06395).

    For another decay, compose the parts: ``warmup(500) >> constant(8_000) >> sqrt(1_500)``.

    Args:
        warmup_steps: Number of steps from 0 to 1.
        stable_steps: Number of steps at 1.
        decay_steps: Number of steps from 1 to ``end``.
        end: The last value.

    Raises:
        TypeError: A number of steps is not an integer, or ``end`` is not a finite number.
        ValueError: A number of steps is negative.

    Example:
        >>> from onepass.schedules import wsd
        >>> schedule = wsd(2, 2, 2)
        >>> [round(schedule(t), 3) for t in range(7)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    return warmup(warmup_steps) >> constant(stable_steps) >> linear(decay_steps, end=end)
