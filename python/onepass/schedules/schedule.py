"""Schedules as functions of the step, and their composition."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ..optimizers.arguments import whole_at_least

if TYPE_CHECKING:
    from numpy.typing import NDArray

# -- checks of arguments -------------------------------------------------------------------------------------------


def step_count(name: str, value: Any) -> int:
    """Return an argument that is a number of steps; raise TypeError or ValueError if it is not an integer >= 0."""
    return whole_at_least(name, value, 0)


def finite_number(name: str, value: Any) -> float:
    """Return an argument as a float; raise TypeError if it is not a finite number."""
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise TypeError(f"{name} must be a finite number, got {value!r}")
    return number + 0.0  # -0.0 becomes 0.0, so that equal schedules have equal values


def _milestones(name: str, value: Any) -> tuple[int, ...]:
    try:
        found = tuple(step_count(name, milestone) for milestone in value)
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
    "int": step_count,
    "int | None": lambda name, value: None if value is None else step_count(name, value),
    "float": finite_number,
    "float | None": lambda name, value: None if value is None else finite_number(name, value),
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
        return self._held(step_count("t", t))

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
        texts = []
        for index, field in enumerate(of):
            value = getattr(self, field.name)
            if value != field.default:
                required = field.default is MISSING
                texts.append(repr(value) if index == 0 or required else f"{field.name}={value!r}")
        return ", ".join(texts)

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
