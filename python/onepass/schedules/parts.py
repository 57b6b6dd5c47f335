"""The parts of schedules and their composition."""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, overload

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

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

# -- checks of arguments -------------------------------------------------------------------------------------------


def _steps(name: str, value: Any) -> int:
    # Floats without a fraction are accepted, for 1e4 and 0.1 * total.
    whole = isinstance(value, float | np.floating) and value.is_integer()
    return _index(name, int(value) if whole else value)


def _index(name: str, value: Any) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer >= 0, got {value!r}") from None
    if count < 0:
        raise ValueError(f"{name} must be >= 0, got {count}")
    return count


def _real(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise TypeError(f"{name} must be a finite number, got {value!r}")
    return number + 0.0  # -0.0 becomes 0.0, so that equal schedules have equal values


def _milestones(name: str, value: Any) -> tuple[int, ...]:
    try:
        found = tuple(_steps(name, milestone) for milestone in value)
    except TypeError:
        raise TypeError(f"{name} must be steps in ascending order, got {value!r}") from None
    if list(found) != sorted(found):
        raise ValueError(f"{name} must be in ascending order, got {value!r}")
    return found


def _function(name: str, value: Any) -> Callable[[int], float]:
    if not callable(value):
        raise TypeError(f"{name} must be a function of the step, got {value!r}")
    return value  # type: ignore[no-any-return]


def _schedule(name: str, value: Any) -> Schedule:
    if not isinstance(value, Schedule):
        raise TypeError(f"{name} must be a schedule, got {value!r}")
    return value


# The check of an argument, by its declared type.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "int": _steps,
    "int | None": lambda name, value: None if value is None else _steps(name, value),
    "float": _real,
    "float | None": lambda name, value: None if value is None else _real(name, value),
    "tuple[int, ...]": _milestones,
    "Callable[[int], float]": _function,
    "Schedule": _schedule,
    "tuple[Schedule, ...]": lambda name, value: tuple(_schedule(name, part) for part in value),
}


# -- schedules -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Schedule:
    """A factor for each step; the base class of all parts and compositions.

    Example:
        >>> from onepass.schedules import cosine, warmup
        >>> schedule = warmup(2) >> cosine(4, end=0.1)
        >>> schedule.length, schedule(1), schedule(2)
        (6, 0.5, 1.0)
        >>> schedule(np.arange(3)).tolist()
        [0.0, 0.5, 1.0]
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            check = _CHECKS[str(field.type)]
            object.__setattr__(self, field.name, check(f"{self._name()}: {field.name}", getattr(self, field.name)))

    def _require(self, fine: bool, name: str, what: str) -> None:
        if not fine:
            raise ValueError(f"{self._name()}: {name} must be {what}, got {getattr(self, name)!r}")

    @classmethod
    def _name(cls) -> str:
        """Return the name of the class in the text of a schedule."""
        return cls.__name__.lstrip("_").lower()

    @cached_property
    def length(self) -> int | None:
        """The step from which on the value is constant; None for a schedule without an end."""
        steps: int | None = getattr(self, "steps", None)  # an argument of parts that have an end
        return steps

    def _at(self, t: int) -> float:
        """Return the value at a step between 0 and the length."""
        raise NotImplementedError

    @overload
    def __call__(self, t: int) -> float: ...
    @overload
    def __call__(self, t: NDArray[np.integer[Any]]) -> NDArray[np.float64]: ...
    def __call__(self, t: int | NDArray[np.integer[Any]]) -> float | NDArray[np.float64]:
        """Return the value at a step.

        Args:
            t: A step, or an array of steps of any shape and integer dtype.

        Returns:
            A float, or a float64 array of the shape of ``t``. Its elements equal the values of single steps bit for
            bit.

        Raises:
            TypeError: ``t`` is not an integer.
            ValueError: ``t`` is negative.
        """
        if isinstance(t, np.ndarray):
            if t.dtype.kind not in "iu":
                raise TypeError(f"t must be integers >= 0, got an array of {t.dtype}")
            return np.fromiter(map(self, t.ravel().tolist()), np.float64, t.size).reshape(t.shape)
        return self._held(_index("t", t))

    def _held(self, t: int) -> float:
        """Return the value at any step >= 0."""
        length = self.length
        return self._at(t if length is None or t < length else length)

    def __rshift__(self, after: Schedule) -> Schedule:
        """Return ``a`` followed by ``b``, whose step 0 is step ``a.length``.

        Raises:
            ValueError: ``a`` has no end.
        """
        return _Chain((*_links(self), *_links(after))) if isinstance(after, Schedule) else NotImplemented

    def repeat(self, times: int | None = None) -> Schedule:
        """Return this schedule repeated: at step ``length`` it starts again.

        Args:
            times: Number of repetitions in total; None: without end. After the last one, the last value is held.

        Raises:
            ValueError: This schedule has no end, or no steps.
        """
        return _Repeat(self, times)

    def scale(self, factor: float) -> Schedule:
        """Return this schedule with all values multiplied by ``factor``."""
        return _Scale(self, factor)

    def shift(self, steps: int) -> Schedule:
        """Return this schedule from step ``steps`` on: its value at t is that of this schedule at ``t + steps``."""
        return _Shift(self, steps)

    def take(self, steps: int) -> Schedule:
        """Return the first ``steps`` steps of this schedule; a shorter schedule is extended by its last value."""
        return _Take(self, steps)

    def clamp(self, low: float | None = None, high: float | None = None) -> Schedule:
        """Return this schedule with its values limited to [``low``, ``high``]; None: no limit."""
        return _Clamp(self, low, high)

    def _arguments(self, of: tuple[Field[Any], ...]) -> str:
        """Return the arguments as text: defaults are omitted, and optional arguments after the first are named."""
        told = []
        for index, field in enumerate(of):
            value = getattr(self, field.name)
            if value != field.default:
                required = field.default is MISSING
                told.append(repr(value) if index == 0 or required else f"{field.name}={value!r}")
        return ", ".join(told)

    def __repr__(self) -> str:
        return f"{self._name()}({self._arguments(fields(self))})"


# -- composition ---------------------------------------------------------------------------------------------------


def _links(schedule: Schedule) -> tuple[Schedule, ...]:
    return schedule.parts if isinstance(schedule, _Chain) else (schedule,)


@dataclass(frozen=True, repr=False)
class _Chain(Schedule):
    """Several schedules in sequence. Nested chains are flattened, so ``(a >> b) >> c == a >> (b >> c)``."""

    parts: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.parts[:-1]:
            if part.length is None:
                raise ValueError(f"{part!r} has no end, so nothing can follow it: use take(n) to end it")

    @cached_property
    def _begins(self) -> tuple[int, ...]:
        """The step at which each part begins."""
        return tuple(accumulate((part.length or 0 for part in self.parts[:-1]), initial=0))

    @cached_property
    def length(self) -> int | None:
        last = self.parts[-1].length
        return None if last is None else self._begins[-1] + last

    def _at(self, t: int) -> float:
        number = bisect_right(self._begins, t) - 1  # parts that begin at the same step have no steps, except the last
        return self.parts[number]._held(t - self._begins[number])

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.parts))


@dataclass(frozen=True, repr=False)
class _Changed(Schedule):
    """A schedule changed by a method, which has the name of the class."""

    schedule: Schedule

    @cached_property
    def length(self) -> int | None:
        return self.schedule.length

    def __repr__(self) -> str:
        changed = f"({self.schedule!r})" if isinstance(self.schedule, _Chain) else repr(self.schedule)
        return f"{changed}.{self._name()}({self._arguments(fields(self)[1:])})"


@dataclass(frozen=True, repr=False)
class _Repeat(_Changed):
    times: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.times != 0, "times", ">= 1")
        if not self.schedule.length:
            raise ValueError(f"{self.schedule!r} has {'no end' if self.schedule.length is None else 'no steps'}, "
                             "so it cannot be repeated")  # fmt: skip

    @cached_property
    def length(self) -> int | None:
        return None if self.times is None else self.times * self._period

    @property
    def _period(self) -> int:
        return self.schedule.length or 0

    def _at(self, t: int) -> float:
        return self.schedule._at(self._period if t == self.length else t % self._period)


@dataclass(frozen=True, repr=False)
class _Scale(_Changed):
    factor: float

    def _at(self, t: int) -> float:
        return self.factor * self.schedule._held(t)


@dataclass(frozen=True, repr=False)
class _Shift(_Changed):
    steps: int

    @cached_property
    def length(self) -> int | None:
        length = self.schedule.length
        return None if length is None else max(length - self.steps, 0)

    def _at(self, t: int) -> float:
        return self.schedule._held(t + self.steps)


@dataclass(frozen=True, repr=False)
class _Take(_Changed):
    steps: int

    @cached_property
    def length(self) -> int:
        return self.steps

    def _at(self, t: int) -> float:
        return self.schedule._held(t)


@dataclass(frozen=True, repr=False)
class _Clamp(_Changed):
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low is not None and self.high is not None:
            self._require(self.low <= self.high, "low", f"<= high ({self.high!r})")

    def _arguments(self, of: tuple[Field[Any], ...]) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in of if getattr(self, f.name) is not None)

    def _at(self, t: int) -> float:
        value = self.schedule._held(t)
        if self.low is not None:
            value = max(value, self.low)
        return value if self.high is None else min(value, self.high)


# -- parts ---------------------------------------------------------------------------------------------------------


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


def _falls(schedule: exponential | step | multistep) -> None:
    schedule._require(0.0 < schedule.gamma <= 1.0, "gamma", "> 0 and <= 1")


@dataclass(frozen=True, repr=False)
class exponential(Schedule):
    r"""Exponential decay: :math:`gamma^t`, without end.

    Args:
        gamma: The factor per step, > 0 and <= 1.

    Example:
        >>> from onepass.schedules import exponential
        >>> schedule = exponential(0.5)
        >>> [round(schedule(t), 3) for t in range(4)]
        [1.0, 0.5, 0.25, 0.125]
    """

    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _falls(self)

    def _at(self, t: int) -> float:
        return math.pow(self.gamma, t)


@dataclass(frozen=True, repr=False)
class step(Schedule):
    r"""Step decay: :math:`gamma^{\lfloor t / every \rfloor}`, without end.

    Args:
        every: Number of steps between two changes, at least 1.
        gamma: The factor of each change, > 0 and <= 1.

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
        _falls(self)

    def _at(self, t: int) -> float:
        return math.pow(self.gamma, t // self.every)


@dataclass(frozen=True, repr=False)
class multistep(Schedule):
    r"""Step decay at given milestones: :math:`gamma^k` from the k-th milestone on, without end.

    Args:
        milestones: The steps at which the value changes, in ascending order.
        gamma: The factor of each change, > 0 and <= 1.

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
        _falls(self)

    def _at(self, t: int) -> float:
        return math.pow(self.gamma, bisect_right(self.milestones, t))


@dataclass(frozen=True, repr=False)
class inverse_sqrt(Schedule):
    r"""Inverse square root decay: :math:`1 / \sqrt{1 + t / timescale}`, without end.

    After ``warmup(n)``, with timescale n, it is the schedule of Vaswani et al. 2017 (arXiv:1706.03762): proportional to
    the inverse square root of the number of all steps.

    Args:
        timescale: Number of steps, at least 1. The value is 1/2 at t = 3 * timescale.

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

    Example:
        >>> from onepass.schedules import wsd
        >>> schedule = wsd(2, 2, 2)
        >>> [round(schedule(t), 3) for t in range(7)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    return warmup(warmup_steps) >> constant(stable_steps) >> linear(decay_steps, end=end)
