"""The parts of schedules, and how they compose."""

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

# -- what arguments may be -----------------------------------------------------------------------------------------


def _steps(name: str, value: Any) -> int:
    # Floats, too, as people write 1e4 and 0.1 * total.
    whole = isinstance(value, float | np.floating) and value.is_integer()
    return _index(name, int(value) if whole else value)


def _index(name: str, value: Any) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: a whole number of steps is wanted, not {value!r}") from None
    if count < 0:
        raise ValueError(f"{name}: {count} is negative")
    return count


def _real(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise TypeError(f"{name}: a finite number is wanted, not {value!r}")
    return number + 0.0  # -0.0 becomes 0.0: they are equal, so the schedules must be, too


def _milestones(name: str, value: Any) -> tuple[int, ...]:
    try:
        found = tuple(_steps(name, milestone) for milestone in value)
    except TypeError:
        raise TypeError(f"{name}: steps in ascending order are wanted, not {value!r}") from None
    if list(found) != sorted(found):
        raise ValueError(f"{name}: {value!r} are not in ascending order")
    return found


def _function(name: str, value: Any) -> Callable[[int], float]:
    if not callable(value):
        raise TypeError(f"{name}: a function of the step is wanted, not {value!r}")
    return value  # type: ignore[no-any-return]


def _schedule(name: str, value: Any) -> Schedule:
    if not isinstance(value, Schedule):
        raise TypeError(f"{name}: a schedule is wanted, not {value!r}")
    return value


# The check of an argument, by the type that it is declared with.
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
    """A factor for every step; what all parts and compositions share.

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
            raise ValueError(f"{self._name()}: {name} must be {what}, not {getattr(self, name)!r}")

    @classmethod
    def _name(cls) -> str:
        """What the class is called in text."""
        return cls.__name__.lstrip("_").lower()

    @cached_property
    def length(self) -> int | None:
        """The step from which on the last value is held; None for a schedule without an end."""
        steps: int | None = getattr(self, "steps", None)  # the argument of parts that have an end
        return steps

    def _at(self, t: int) -> float:
        """The value at a step from 0 to the length."""
        raise NotImplementedError

    @overload
    def __call__(self, t: int) -> float: ...
    @overload
    def __call__(self, t: NDArray[np.integer[Any]]) -> NDArray[np.float64]: ...
    def __call__(self, t: int | NDArray[np.integer[Any]]) -> float | NDArray[np.float64]:
        """Tells the value at a step.

        Args:
            t: The step, or an array of steps, of any integer dtype and any shape.

        Returns:
            A float, or a float64 array of the shape of ``t``, with the same bits that each step alone has.

        Raises:
            TypeError: ``t`` is not whole.
            ValueError: ``t`` is negative.
        """
        if isinstance(t, np.ndarray):
            if t.dtype.kind not in "iu":
                raise TypeError(f"t: whole steps are wanted, not an array of {t.dtype}")
            return np.fromiter(map(self, t.ravel().tolist()), np.float64, t.size).reshape(t.shape)
        return self._held(_index("t", t))

    def _held(self, t: int) -> float:
        """The value at any step that is not negative."""
        length = self.length
        return self._at(t if length is None or t < length else length)

    def __rshift__(self, after: Schedule) -> Schedule:
        """``a >> b``: ``a``, and from the step ``a.length`` on ``b``, which begins there.

        Raises:
            ValueError: ``a`` has no end.
        """
        return _Chain((*_links(self), *_links(after))) if isinstance(after, Schedule) else NotImplemented

    def repeat(self, times: int | None = None) -> Schedule:
        """This schedule over and over: at the step ``length`` it begins again. The last time it ends.

        Args:
            times: How many times in all; without end by default.

        Raises:
            ValueError: This schedule has no end, or no steps.
        """
        return _Repeat(self, times)

    def scale(self, factor: float) -> Schedule:
        """All values multiplied by a factor."""
        return _Scale(self, factor)

    def shift(self, steps: int) -> Schedule:
        """This schedule from its step ``steps`` on: at t it has the value of ``t + steps``."""
        return _Shift(self, steps)

    def take(self, steps: int) -> Schedule:
        """The first ``steps`` steps of this schedule, so that another can follow; one that is shorter is held."""
        return _Take(self, steps)

    def clamp(self, low: float | None = None, high: float | None = None) -> Schedule:
        """The values, none below ``low`` and none above ``high``."""
        return _Clamp(self, low, high)

    def _arguments(self, of: tuple[Field[Any], ...]) -> str:
        """The arguments as one would write them: what has its default is left out, and only the first is not named."""
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
    """One schedule after the other. It is flat, so ``(a >> b) >> c == a >> (b >> c)``."""

    parts: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.parts[:-1]:
            if part.length is None:
                raise ValueError(f"{part!r} has no end, so nothing can follow it: take(n) gives it one")

    @cached_property
    def _begins(self) -> tuple[int, ...]:
        """The step at which each part begins."""
        return tuple(accumulate((part.length or 0 for part in self.parts[:-1]), initial=0))

    @cached_property
    def length(self) -> int | None:
        last = self.parts[-1].length
        return None if last is None else self._begins[-1] + last

    def _at(self, t: int) -> float:
        number = bisect_right(self._begins, t) - 1  # of parts that begin at once, the last: the others have no steps
        return self.parts[number]._held(t - self._begins[number])

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.parts))


@dataclass(frozen=True, repr=False)
class _Changed(Schedule):
    """What a method makes of a schedule; named as the method is."""

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
        self._require(self.times != 0, "times", "at least 1")
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
            self._require(self.low <= self.high, "low", f"at most high ({self.high!r})")

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
    """A part of so many steps."""

    steps: int

    def _left(self, t: int) -> float:
        """How much of the way is left, from 1 to 0; none where there are no steps."""
        return (self.steps - t) / self.steps if self.steps else 0.0

    def _done(self, t: int) -> float:
        """How much of the way has been gone, from 0 to 1."""
        return t / self.steps if self.steps else 1.0


def _mix(start: float, end: float, left: float, done: float) -> float:
    """``left * start + done * end``, for weights whose sum is 1: exact at both ends, and never beyond them."""
    return start + (end - start) * done if done < left else end + (start - end) * left


def _wave(start: float, end: float, turns: float) -> float:
    """A wave that is at ``start`` after whole turns and at ``end`` half a turn later."""
    height = math.cos(2.0 * math.pi * turns)
    return _mix(start, end, (1.0 + height) / 2.0, (1.0 - height) / 2.0)


@dataclass(frozen=True, repr=False)
class constant(Schedule):
    """One value.

    Args:
        steps: How long, before something else can follow; without end by default.
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
        steps: From start to end.
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
        steps: From start to 1.
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
    r"""Half a wave: :math:`end + (start - end) \, (1 + \cos(2 \pi \cdot cycles \cdot t / steps)) / 2`.

    Loshchilov and Hutter 2017 (arXiv:1608.03983), without their restarts.

    Args:
        steps: From the first value to the last.
        start: The value at t = 0.
        end: The value at t = steps, if it is half a wave.
        cycles: How many waves.

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
    r"""A power of what is left: :math:`end + (start - end) \, (1 - t / steps)^{power}`.

    Args:
        steps: From start to end.
        power: The exponent, above 0.
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
        self._require(self.power > 0.0, "power", "above 0")

    def _at(self, t: int) -> float:
        left = math.pow(self._left(t), self.power)
        return _mix(self.start, self.end, left, 1.0 - left)


@dataclass(frozen=True, repr=False)
class sqrt(_Timed):
    r"""The "1-sqrt" cooldown: :math:`start + (end - start) \sqrt{t / steps}` (Hägele et al. 2024, arXiv:2405.18392).

    Args:
        steps: From start to end.
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
        steps: From start to end.
        start: The value at t = 0, above 0.
        end: The value at t = steps, above 0.

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
        self._require(self.start > 0.0, "start", "above 0")
        self._require(self.end > 0.0, "end", "above 0")

    def _at(self, t: int) -> float:
        return math.pow(self.start, self._left(t)) * math.pow(self.end, self._done(t))


def _falls(schedule: exponential | step | multistep) -> None:
    schedule._require(0.0 < schedule.gamma <= 1.0, "gamma", "above 0 and at most 1")


@dataclass(frozen=True, repr=False)
class exponential(Schedule):
    r"""The same factor at every step: :math:`gamma^t`, without end.

    Args:
        gamma: The factor, above 0 and at most 1.

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
    r"""Stairs: :math:`gamma^{\lfloor t / every \rfloor}`, without end.

    Args:
        every: The steps between two stairs, at least 1.
        gamma: The factor of a stair, above 0 and at most 1.

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
        self._require(self.every > 0, "every", "at least 1")
        _falls(self)

    def _at(self, t: int) -> float:
        return math.pow(self.gamma, t // self.every)


@dataclass(frozen=True, repr=False)
class multistep(Schedule):
    r"""Stairs where one wants them: :math:`gamma^k` from the k-th milestone on, without end.

    Args:
        milestones: Steps, in ascending order.
        gamma: The factor of a stair, above 0 and at most 1.

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
    r"""The decay of the first transformer: :math:`1 / \sqrt{1 + t / timescale}`, without end.

    After ``warmup(n)``, with n for the timescale, it is that of Vaswani et al. 2017 (arXiv:1706.03762), in proportion
    to 1 over the root of all steps.

    Args:
        timescale: Steps, at least 1: the value is 1/2 after three times as many.

    Example:
        >>> from onepass.schedules import inverse_sqrt
        >>> schedule = inverse_sqrt(4)
        >>> [round(schedule(t), 3) for t in range(5)]
        [1.0, 0.894, 0.816, 0.756, 0.707]
    """

    timescale: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.timescale > 0, "timescale", "at least 1")

    def _at(self, t: int) -> float:
        return 1.0 / math.sqrt((t + self.timescale) / self.timescale)


@dataclass(frozen=True, repr=False)
class restarts(Schedule):
    r"""Half a wave of a cosine, again and again, without end (SGDR: Loshchilov and Hutter 2017, arXiv:1608.03983).

    :math:`end + (start - end) \, (1 + \cos(\pi \, t_i / T_i)) / 2`, where :math:`T_i = period \cdot mult^i` are the
    steps of the i-th wave and :math:`t_i` is the step in it.

    Args:
        period: The steps of the first wave (T_0), at least 1.
        mult: How many times as long each wave is as the one before (T_mult), at least 1.
        start: The value at the beginning of a wave.
        end: The value that each wave falls towards.

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
        self._require(self.period > 0, "period", "at least 1")
        self._require(self.mult > 0, "mult", "at least 1")

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
    r"""So many half waves of a cosine in so many steps, all equally long.

    :math:`end + (start - end) \, (1 + \cos(\pi \, (cycles \cdot t / steps \bmod 1))) / 2`, and ``end`` at t = steps.

    Args:
        steps: All waves together. A wave need not be a whole number of steps.
        cycles: How many waves, at least 1.
        start: The value at the beginning of a wave.
        end: The value that each wave falls towards.

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
        self._require(self.cycles > 0, "cycles", "at least 1")

    def _at(self, t: int) -> float:
        if t == self.steps:
            return self.end
        # In whole numbers, as a rounded remainder could miss the restart.
        return _wave(self.start, self.end, 0.5 * (self.cycles * t % self.steps) / self.steps)


@dataclass(frozen=True, repr=False)
class one_cycle(_Timed):
    r"""Up to 1 and down again, each by half a wave of a cosine (Smith and Topin 2018, arXiv:1708.07120).

    As ``torch.optim.lr_scheduler.OneCycleLR`` has it: of the steps 0 to steps - 1, that at
    :math:`peak \cdot steps - 1` (which may lie between two) has the value 1, the last one ``end``.

    Args:
        steps: All of them, at least 1.
        peak: The part of the steps in which it rises, from 0 to 1.
        start: The value at t = 0; torch's 1 / div_factor.
        end: The value at t = steps - 1; torch's 1 / (div_factor * final_div_factor).

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
        self._require(self.steps > 0, "steps", "at least 1")
        self._require(0.0 <= self.peak <= 1.0, "peak", "from 0 to 1")

    def _at(self, t: int) -> float:
        last = self.steps - 1
        top = self.peak * self.steps - 1.0
        t = min(t, last)
        if t <= top:
            return _wave(self.start, 1.0, 0.5 * (t / top if top else 1.0))
        return _wave(1.0, self.end, 0.5 * (t - top) / (last - top))


@dataclass(frozen=True, repr=False)
class function(Schedule):
    """A function of one's own.

    Its ``repr`` has the function's name, and is nothing that :func:`parse` reads. It is pickled as functions are: by
    that name.

    Args:
        f: Tells the value at a step. It must depend on the step alone.
        steps: The step from which on its value is held; without end by default.

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
        # Not the function's own repr: its address is another one in the process that takes up a run.
        named = self.f if hasattr(self.f, "__qualname__") else type(self.f)
        steps = "" if self.steps is None else f", steps={self.steps}"
        return f"{self._name()}({named.__module__}.{named.__qualname__}{steps})"


def wsd(warmup_steps: int, stable_steps: int, decay_steps: int, end: float = 0.0) -> Schedule:
    """Warm-up, stable, decay: ``warmup(..) >> constant(..) >> linear(.., end=end)`` (Hu et al. 2024, arXiv:2404.06395).

    For another decay, write it: ``warmup(500) >> constant(8_000) >> sqrt(1_500)``.

    Args:
        warmup_steps: The steps of the rise from 0 to 1.
        stable_steps: The steps at 1.
        decay_steps: The steps of the fall from 1 to ``end``.
        end: The last value.

    Example:
        >>> from onepass.schedules import wsd
        >>> schedule = wsd(2, 2, 2)
        >>> [round(schedule(t), 3) for t in range(7)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    return warmup(warmup_steps) >> constant(stable_steps) >> linear(decay_steps, end=end)
