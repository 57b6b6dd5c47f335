r"""Schedules: pure functions of the step, composed from parts.

A schedule returns a factor for each step :math:`t = 0, 1, 2, \ldots`, which depends on the step only.
:class:`~onepass.ScheduleLR` multiplies the optimizer's initial learning rate by that factor::

    from onepass.schedules import cosine, parse, warmup

    schedule = warmup(500) >> cosine(10_000, end=0.1)
    schedule(0), schedule(500), schedule(10_500)      # 0.0, 1.0, 0.1
    schedule(np.arange(schedule.length))              # an array, bit for bit the same
    schedule == parse("warmup(500) >> cosine(10_000, end=0.1)") == parse(repr(schedule))

A schedule of length n has its first value at t = 0 and its last value at t = n and at all later steps. In ``a >> b``,
step ``t = a.length`` is step 0 of b: the value there is ``b(0)``, and the last value of a is not used. So
``warmup(500) >> cosine(10_000)`` is 499/500 at t = 499, 1 at t = 500, and 0 from t = 10,500 on. A part of length 0 has
no steps.

Schedules are immutable and can be compared, hashed and pickled. :func:`parse` reads the ``repr`` of a schedule.
"""

from . import parts, schedule
from .parser import parse
from .parts import *  # noqa: F403
from .parts import __all__ as _parts

__all__ = [*_parts, "parse"]

# Pickles store the public path, so that modules can move. Compositions have private names, which are here, too.
for _name, _part in [*vars(schedule).items(), *vars(parts).items(), ("parse", parse)]:
    if getattr(_part, "__module__", "").startswith(f"{__name__}."):
        globals()[_name] = _part
        _part.__module__ = __name__
