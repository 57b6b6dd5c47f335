r"""Schedules: pure functions of the step, built from parts that compose.

A schedule tells a factor for every step :math:`t = 0, 1, 2, \ldots` (what the learning rate that an optimizer was made
with is multiplied by, where :class:`~onepass.ScheduleLR` drives it), and depends on nothing else::

    from onepass.schedules import cosine, parse, warmup

    schedule = warmup(500) >> cosine(10_000, end=0.1)
    schedule(0), schedule(500), schedule(10_500)      # 0.0, 1.0, 0.1
    schedule(np.arange(schedule.length))              # an array, of the same bits
    schedule == parse("warmup(500) >> cosine(10_000, end=0.1)") == parse(repr(schedule))

A schedule of length n has its first value at t = 0, its last at t = n, and holds it from there on. In ``a >> b`` the
step ``t = a.length`` is b's step 0: what stands at the joint is ``b(0)``, and a's last value is never seen. So
``warmup(500) >> cosine(10_000)`` has risen to 499/500 at t = 499, is 1 at t = 500 and 0 from t = 10,500 on. A part of
length 0 has no steps.

Schedules are immutable, can be compared, hashed and pickled, and their ``repr`` is the text that :func:`parse` reads.
"""

from . import parts
from .parser import parse
from .parts import (
    Schedule,
    constant,
    cosine,
    exponential,
    function,
    geometric,
    hard_restarts,
    inverse_sqrt,
    linear,
    multistep,
    one_cycle,
    polynomial,
    restarts,
    sqrt,
    step,
    warmup,
    wsd,
)

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
    "parse",
    "polynomial",
    "restarts",
    "sqrt",
    "step",
    "warmup",
    "wsd",
]

# By public paths, which pickles store: modules may move. Compositions have private names, which are found here, too.
for _name, _part in [*vars(parts).items(), ("parse", parse)]:
    if getattr(_part, "__module__", "").startswith(f"{__name__}."):
        globals()[_name] = _part
        _part.__module__ = __name__
