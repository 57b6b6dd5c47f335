"""Pure schedules: their formulas, composition, exactness, and the text that they are written as and read from."""

import contextlib
import copy
import functools
import math
import pickle
import pickletools
from dataclasses import FrozenInstanceError

import numpy as np
import onepass.schedules
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from onepass.schedules import (
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
    parse,
    polynomial,
    restarts,
    sqrt,
    step,
    warmup,
    wsd,
)
from torch.optim import lr_scheduler

counts = st.integers(0, 60)
several = st.integers(1, 40)
values = st.floats(-2, 2).map(lambda x: round(x, 3))
positive = st.floats(0.01, 2).map(lambda x: round(x, 3))
falls = st.floats(0.1, 1).map(lambda x: round(x, 3))

RAMPS = st.one_of(
    st.builds(linear, counts, values, values),
    st.builds(warmup, counts, values),
    st.builds(cosine, counts, values, values),
    st.builds(polynomial, counts, positive, values, values),
    st.builds(sqrt, counts, values, values),
    st.builds(geometric, counts, positive, positive),
)
FINITE = st.one_of(
    RAMPS,
    st.builds(constant, counts, values),
    st.builds(cosine, counts, values, values, positive),
    st.builds(hard_restarts, counts, several, values, values),
    st.builds(one_cycle, several, st.floats(0, 1), values, values),
    st.builds(wsd, counts, counts, counts, values),
)
ENDLESS = st.one_of(
    st.builds(constant, st.none(), values),
    st.builds(exponential, falls),
    st.builds(step, several, falls),
    st.builds(multistep, st.lists(counts, max_size=4).map(sorted).map(tuple), falls),
    st.builds(inverse_sqrt, several),
    st.builds(restarts, several, st.integers(1, 3), values, values),
)


def composed(inner):
    finite = inner.filter(lambda s: s.length is not None)
    return st.one_of(
        st.builds(lambda a, b: a >> b, finite, inner),
        st.builds(lambda a, n: a.repeat(n), finite.filter(lambda s: s.length > 0), st.none() | several),
        st.builds(Schedule.scale, inner, values),
        st.builds(Schedule.shift, inner, counts),
        st.builds(Schedule.take, inner, counts),
        st.builds(lambda a, low, high: a.clamp(min(low, high), max(low, high)), inner, values, values),
    )


ANY = st.recursive(FINITE | ENDLESS, composed, max_leaves=6)
T = np.arange(200)


# -- what holds for all ------------------------------------------------------------------------------------------------


@given(ANY, st.sampled_from([(200,), (20, 10), (2, 5, 20)]), st.sampled_from(["int64", "int32", "uint8"]))
def test_arrays_have_the_bits_of_scalars(schedule, shape, dtype):
    got = schedule(T.astype(dtype).reshape(shape))
    assert got.dtype == np.float64
    assert got.shape == shape
    assert [x.hex() for x in got.ravel().tolist()] == [schedule(t).hex() for t in range(200)]


@given(ANY)
@example(polynomial(0, power=0.7, start=-1.5, end=-0.0).take(0))
def test_text_is_read_back(schedule):
    again = parse(repr(schedule))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again(T).tobytes() == schedule(T).tobytes()


@given(ANY)
def test_copies_are_equal(schedule):
    for again in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert again == schedule
        assert again(T).tobytes() == schedule(T).tobytes()


@given(ANY, counts)
def test_the_last_value_is_held(schedule, more):
    if schedule.length is not None:
        assert schedule(schedule.length + more).hex() == schedule(schedule.length).hex()


@given(ANY, st.data())
def test_a_step_does_not_depend_on_those_before(schedule, data):
    """Asked in any order, a schedule says the same."""
    order = data.draw(st.permutations(range(60)))
    asked = {t: schedule(t) for t in order}
    assert [asked[t] for t in range(60)] == schedule(T[:60]).tolist()


@given(FINITE, ANY)
def test_the_joint(a, b):
    chain = a >> b
    assert chain.length == (None if b.length is None else a.length + b.length)
    assert chain(T).tolist() == [a(t) if t < a.length else b(t - a.length) for t in range(200)]


@given(FINITE, FINITE, ANY)
def test_chains_are_associative(a, b, c):
    assert (a >> b) >> c == a >> (b >> c)


@given(FINITE.filter(lambda s: s.length > 0), several)
def test_repeat(a, times):
    n = a.length
    again, endless = a.repeat(times), a.repeat()
    assert again.length == n * times
    assert endless.length is None
    assert endless(T).tolist() == [a(t % n) for t in range(200)]
    assert again(T).tolist() == [a(t % n) if t < n * times else a(n) for t in range(200)]


@given(ANY, values, counts, values, values)
def test_methods(a, factor, n, x, y):
    low, high = sorted((x, y))
    assert a.scale(factor)(T).tolist() == [factor * a(t) for t in range(200)]
    assert a.shift(n)(T).tolist() == [a(t + n) for t in range(200)]
    assert a.take(n).length == n
    assert a.take(n)(T).tolist() == [a(min(t, n)) for t in range(200)]
    assert a.clamp(low, high)(T).tolist() == [min(max(a(t), low), high) for t in range(200)]
    assert a.clamp(low)(T).tolist() == [max(a(t), low) for t in range(200)]
    assert a.clamp(high=high)(T).tolist() == [min(a(t), high) for t in range(200)]


@given(RAMPS)
def test_ramps_are_exact_at_their_ends_and_monotone_between(ramp):
    n = ramp.length
    start, end = getattr(ramp, "start", 0.0), getattr(ramp, "end", 1.0)
    got = ramp(np.arange(n + 1))
    assert got[-1] == end
    assert n == 0 or got[0] == start
    rounding = 4 * np.finfo(float).eps * max(abs(start), abs(end))
    assert (got >= min(start, end) - rounding).all()
    assert (got <= max(start, end) + rounding).all()
    assert (np.diff(got) * np.sign(end - start) >= -rounding).all()


# -- formulas, in NumPy ------------------------------------------------------------------------------------------------

N = 97
P = np.minimum(T / N, 1.0)

FORMULAS = [
    (constant(value=0.3), np.full(200, 0.3)),
    (linear(N, 0.2, 1.5), 0.2 + 1.3 * P),
    (warmup(N, 0.1), 0.1 + 0.9 * P),
    (cosine(N, 0.9, 0.1), 0.1 + 0.4 * (1 + np.cos(np.pi * P))),
    (cosine(N, cycles=1.75), (1 + np.cos(3.5 * np.pi * P)) / 2),
    (polynomial(N, 2.5, 1.2, 0.2), 0.2 + (1 - P) ** 2.5),
    (sqrt(N, 1.0, 0.1), 1 - 0.9 * np.sqrt(P)),
    (geometric(N, 1e-6, 10.0), 10 ** (7 * P - 6)),
    (exponential(0.93), 0.93**T),
    (step(30, 0.5), 0.5 ** (T // 30)),
    (multistep([30, 80, 80], 0.5), np.select([T < 30, T < 80], [1.0, 0.5], 0.125)),
    (inverse_sqrt(40), np.sqrt(40 / (40 + T))),
    (restarts(20), (1 + np.cos(np.pi * (T % 20) / 20)) / 2),
    (
        restarts(20, 2, end=0.1),
        0.55
        + 0.45
        * np.cos(np.pi * np.select([T < 20, T < 60, T < 140], [T / 20, (T - 20) / 40, (T - 60) / 80], (T - 140) / 160)),
    ),
    (hard_restarts(200, 8, end=0.2), 0.6 + 0.4 * np.cos(np.pi * (T % 25) / 25)),
    (wsd(20, 50, 30, 0.1), np.interp(T, [0, 20, 70, 100], [0, 1, 1, 0.1])),
    (function(lambda t: t * t), T**2.0),
    (function(lambda t: t * t, 9), np.minimum(T, 9) ** 2.0),
]


@pytest.mark.parametrize(("schedule", "expected"), FORMULAS, ids=lambda x: repr(x)[:30] if callable(x) else "")
def test_formulas(schedule, expected):
    np.testing.assert_allclose(schedule(T), expected, rtol=1e-13, atol=1e-15)


def test_the_example_of_the_documentation():
    schedule = warmup(500) >> cosine(10_000)
    assert (schedule.length, schedule(0), schedule(499), schedule(500), schedule(10_500)) == (
        10_500, 0.0, 499 / 500, 1.0, 0.0,
    )  # fmt: skip
    assert schedule(10**9) == 0.0
    assert repr(schedule) == "warmup(500) >> cosine(10000)"
    assert repr(schedule.repeat(3).scale(0.5)) == "(warmup(500) >> cosine(10000)).repeat(3).scale(0.5)"


# -- torch's, over 1,000 steps -----------------------------------------------------------------------------------------


def torch_rates(make, n=1000, **options):
    opt = torch.optim.SGD([torch.zeros(1)], lr=1.0, **options)
    scheduler = make(opt)
    rates = []
    for _ in range(n):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return np.array(rates)


TORCH = [
    (constant(300, 0.25) >> constant(), lambda o: lr_scheduler.ConstantLR(o, 0.25, 300)),
    (linear(300, 1 / 3, 1.0), lambda o: lr_scheduler.LinearLR(o, 1 / 3, 1.0, 300)),
    (linear(700, 0.9, 0.2), lambda o: lr_scheduler.LinearLR(o, 0.9, 0.2, 700)),
    (cosine(999, end=0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, 999, 0.1)),
    (polynomial(700, 2.0), lambda o: lr_scheduler.PolynomialLR(o, 700, 2.0)),
    (exponential(0.99), lambda o: lr_scheduler.ExponentialLR(o, 0.99)),
    (step(70, 0.7), lambda o: lr_scheduler.StepLR(o, 70, 0.7)),
    (multistep([30, 300, 300, 800], 0.3), lambda o: lr_scheduler.MultiStepLR(o, [30, 300, 300, 800], 0.3)),
    (restarts(70, end=0.01), lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 70, 1, 0.01)),
    (restarts(30, 2), lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 30, 2)),
    (one_cycle(1000), lambda o: lr_scheduler.OneCycleLR(o, 1.0, 1000, cycle_momentum=False)),
    (one_cycle(997, 0.31), lambda o: lr_scheduler.OneCycleLR(o, 1.0, 997, pct_start=0.31, cycle_momentum=False)),
    (
        (linear(40, 0.1, 1.0) >> linear(60, 1.0, 0.1)).repeat(),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 40, 60, cycle_momentum=False),
    ),
    (
        linear(100, 0.1, 1.0) >> exponential(0.995),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 100), lr_scheduler.ExponentialLR(o, 0.995)], [100]
        ),
    ),
]


@pytest.mark.parametrize(("schedule", "make"), TORCH, ids=[repr(schedule) for schedule, _ in TORCH])
def test_torchs(schedule, make):
    """To 1e-12 of the first rate: torch's recursions round at every step, and cosines cancel near their end."""
    n = 997 if schedule == one_cycle(997, 0.31) else 1000
    np.testing.assert_allclose(schedule(np.arange(n)), torch_rates(make, n), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("peak", [0.0, 0.1, 0.5, 1.0])
def test_one_cycles_of_a_few_steps(steps, peak):
    """torch divides by zero in some of them."""
    got = one_cycle(steps, peak)(np.arange(steps))
    assert np.isfinite(got).all()
    assert ((got >= 0) & (got <= 1)).all()


# -- the parser --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("warmup(500) >> cosine(10_000)", warmup(500) >> cosine(10_000)),
        (" (warmup( 5 )\n >> cosine(steps=3, end=1e-1)).repeat(3)\t", (warmup(5) >> cosine(3, end=0.1)).repeat(3)),
        ("linear(9, -1, end=-.5)", linear(9, -1.0, -0.5)),
        ("multistep([30, 80], gamma=0.5) ", multistep((30, 80), 0.5)),
        ("multistep((30,))", multistep([30])),
        ("constant(None, 2)", constant(value=2.0)),
        ("wsd(1, 2, 3)", warmup(1) >> constant(2) >> linear(3)),
        ("step(3).take(9).shift(1).clamp(low=.2).repeat()", step(3).take(9).shift(1).clamp(low=0.2).repeat()),
        ("((cosine(3)))", cosine(3)),
        ("warmup(1e4) >> cosine(steps=2.5e3)", warmup(10_000) >> cosine(2_500)),
        ("multistep([1e2, 300.0]).take(5.0).repeat(2.0)", multistep([100, 300]).take(5).repeat(2)),
    ],
)  # fmt: skip
def test_parse(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "position", "why"),
    [
        ("", 1, "not a schedule"),
        ("cosine(3) >>", 1, "not a schedule"),
        ("cosine(3", 7, "never closed"),
        ("cosin(3)", 1, "no part 'cosin'; known are constant, cosine"),
        ("warmup(3) >> cosin(3)", 14, "no part 'cosin'"),
        ("warmup(3) >> 'é' >> x", 14, "expected a schedule"),
        ("cosine", 1, r"cosine\(steps, start, end, cycles\)"),
        ("cosine()", 1, "missing a required argument: 'steps'"),
        ("cosine(3, 1, 2, 3, 4)", 1, "too many positional"),
        ("cosine(3, ende=1)", 11, "no argument ende; known are steps, start, end, cycles"),
        ("cosine(**x)", 8, "no argument"),
        ("cosine(*x)", 8, "expected a number"),
        ("cosine('3')", 8, "expected a number"),
        ("cosine(True)", 8, "expected a number"),
        ("cosine(-True)", 8, "expected a number"),
        ("cosine(3).scale(-None)", 17, "expected a number"),
        ("cosine(3j)", 8, "expected a number"),
        ("cosine(1 + 1)", 8, "expected a number"),
        ("cosine(__import__('os'))", 8, "expected a number"),
        ("cosine(3.5)", 1, "steps must be an integer >= 0, got the float 3.5"),
        ("cosine(-3)", 1, "steps must be >= 0, got -3"),
        ("cosine(3, end=1e999)", 1, "end must be a finite number"),
        ("cosine(3).foo()", 10, "no method .foo; known are clamp, repeat"),
        ("cosine(3).__class__()", 10, "no method"),
        ("cosine(3).length", 1, "expected a schedule"),
        ("cosine(3).repeat(0)", 10, "times must be >= 1"),
        ("constant().repeat(2)", 11, "has no end"),
        ("cosine(0).repeat(2)", 10, "has no steps"),
        ("constant() >> cosine(3)", 1, "nothing can follow"),
        ("cosine(3)(4)", 1, "expected a schedule"),
        ("cosine(3) << cosine(3)", 1, "expected a schedule"),
        ("lambda: 0", 1, "expected a schedule"),
        ("function(abs)", 1, "no part 'function'"),
        ("(" * 5000, 201, "not a schedule"),
    ],
)
def test_errors_tell_where_and_what(text, position, why):
    with pytest.raises(ValueError, match=why) as error:
        parse(text)
    message = str(error.value)
    if text != "(" * 5000:  # where Python gives up is its own affair
        assert message.startswith(f"at position {position}, ")
        assert message.endswith("    " + " " * (position - 1) + "^")


@given(st.text(max_size=40) | st.text("cosinewarmup()>., 0123=", max_size=40))
def test_any_text_is_a_schedule_or_a_value_error(text):
    with contextlib.suppress(ValueError):
        assert isinstance(parse(text), Schedule)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "why"),
    [
        (lambda: cosine(-1), ValueError, "cosine: steps"),
        (lambda: cosine(1.5), TypeError, "cosine: steps must be an integer >= 0, got the float 1.5"),
        (lambda: cosine(True), TypeError, "cosine: steps must be an integer >= 0, got the bool True"),
        (lambda: cosine(-1e4), ValueError, "cosine: steps"),
        (lambda: cosine(math.inf), TypeError, "cosine: steps"),
        (lambda: cosine(math.nan), TypeError, "cosine: steps"),
        (lambda: multistep([3, 4.5]), TypeError, "multistep: milestones"),
        (lambda: cosine("3"), TypeError, "cosine: steps"),
        (lambda: linear(3, math.nan), TypeError, "linear: start"),
        (lambda: linear(3, 1, math.inf), TypeError, "linear: end"),
        (lambda: linear(3, "1"), TypeError, "linear: start"),
        (lambda: polynomial(3, 0), ValueError, "polynomial: power"),
        (lambda: geometric(3, 0), ValueError, "geometric: start"),
        (lambda: geometric(3, 1, -1), ValueError, "geometric: end"),
        (lambda: exponential(0), ValueError, "exponential: gamma"),
        (lambda: step(0), ValueError, "step: every"),
        (lambda: step(3, 1.5), ValueError, "step: gamma"),
        (lambda: multistep([3, 2]), ValueError, "multistep: milestones"),
        (lambda: multistep(3), TypeError, "multistep: milestones"),
        (lambda: inverse_sqrt(0), ValueError, "inverse_sqrt: timescale"),
        (lambda: restarts(0), ValueError, "restarts: period"),
        (lambda: restarts(1, 0), ValueError, "restarts: mult"),
        (lambda: hard_restarts(1, 0), ValueError, "hard_restarts: cycles"),
        (lambda: one_cycle(0), ValueError, "one_cycle: steps"),
        (lambda: one_cycle(9, 1.1), ValueError, "one_cycle: peak"),
        (lambda: function(3), TypeError, "function: f"),
        (lambda: cosine(3).repeat(0), ValueError, "repeat: times"),
        (lambda: cosine(3).scale(math.nan), TypeError, "scale: factor"),
        (lambda: cosine(3).clamp(1, 0), ValueError, "clamp: low"),
        (lambda: cosine(3).shift(-1), ValueError, "shift: steps"),
        (lambda: step(3) >> cosine(3), ValueError, "step\\(3\\) has no end"),
        (lambda: cosine(3) >> 3, TypeError, "unsupported"),
        (lambda: cosine(3)(-1), ValueError, "t must be >= 0, got -1"),
        (lambda: cosine(3)(np.array([1, -1])), ValueError, "t must be >= 0, got -1"),
        (lambda: cosine(3)(1.5), TypeError, "t must be "),
        (lambda: cosine(3)(np.array([1.0])), TypeError, "t must be "),
        (lambda: parse(3), TypeError, "text must be "),
    ],
)
def test_bad_input_is_named(make, error, why):
    with pytest.raises(error, match=why):
        make()


def test_whole_floats_are_numbers_of_steps():
    for count in (1e4, 0.1 * 100_000, np.float64(1e4), np.float32(1e4), np.int64(10_000)):
        schedule = warmup(count) >> constant()
        assert schedule == warmup(10_000) >> constant()
        assert repr(schedule) == "warmup(10000) >> constant()"
    assert multistep([1e2, 300.0]).milestones == (100, 300)
    assert step(3.0) == step(3)


def test_schedules_do_not_change():
    schedule = cosine(3)
    with pytest.raises(FrozenInstanceError):
        schedule.steps = 4
    assert {schedule: 1}[cosine(3, 1)] == 1
    assert schedule != linear(3)


def test_pickles_refer_to_public_paths():
    composed = (warmup(3) >> cosine(4)).repeat(2).scale(0.5).shift(1).take(9).clamp(0.0, 1.0)
    texts = {text for _, text, _ in pickletools.genops(pickle.dumps(composed)) if isinstance(text, str)}
    assert {text for text in texts if text.startswith("onepass")} == {"onepass.schedules"}
    assert pickle.loads(pickle.dumps(composed)) == composed


def test_every_part_has_a_formula_above():
    named = " ".join(repr(schedule) for schedule, _ in FORMULAS)
    others = {"Schedule", "function", "parse", "one_cycle", "wsd"}  # the last two are compositions
    assert {name for name in set(onepass.schedules.__all__) - others if f"{name}(" not in named} == set()


def test_an_argument_that_is_named_twice_is_refused():
    with pytest.raises(ValueError, match="at position 17, warmup: steps is given twice"):
        parse("warmup(steps=1, steps=2)")


def test_a_function_is_told_by_its_name_which_the_next_process_has_too():
    assert repr(function(math.sqrt)) == "function(math.sqrt)"
    assert repr(function(T.__class__, 4)) == "function(numpy.ndarray, steps=4)"
    assert " at 0x" not in repr(function(lambda t: 1.0))
    assert " at 0x" not in repr(function(functools.partial(pow, 2)))
