"""ScheduleLR in training: what it sets, how it resumes, plateaus, GradScaler; and the schedules of transformers."""

import contextlib
import copy
import functools
import gc
import io
import math
import pickle

import numpy as np
import onepass
import pytest
import torch
from contract import AroundOther, assert_same, give_gradients, leaves, snapshot, train
from onepass.schedules import constant, cosine, exponential, function, linear, step, warmup
from onepass.schedules import transformers as family
from onepass.schedules.schedule_lr import ScheduleLR
from reference import params_of
from torch.optim import lr_scheduler

pytestmark = pytest.mark.usefixtures("one_thread")

S = warmup(5) >> cosine(15, end=0.1)
ADAMS = [onepass.AdamW, torch.optim.AdamW]
FUSED_ADAMS = [functools.partial(cls, fused=True) for cls in ADAMS]
SGDS = [onepass.SGD, torch.optim.SGD]


def new(cls=onepass.SGD, groups=1, lr=0.1, **options):
    return cls([{"params": leaves([(3,)], seed=i), "lr": lr * (i + 1)} for i in range(groups)], **options)


def run(opt, scheduler, steps, first=0):
    """Trains, and tells the rates that each step used."""
    rates = []
    for t in range(first, first + steps):
        rates.append([float(group["lr"]) for group in opt.param_groups])
        train(opt, 1, first=t)
        scheduler.step()
    return np.array(rates)


def hypers(opt):
    return [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]


# -- what it sets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", SGDS + ADAMS)
@pytest.mark.parametrize("schedule", [S, repr(S)])
def test_each_step_uses_base_times_schedule(cls, schedule):
    opt = new(cls, 2)
    scheduler = ScheduleLR(opt, schedule)
    got = run(opt, scheduler, 30)
    assert got.tolist() == [[0.1 * S(t), 0.2 * S(t)] for t in range(30)]
    assert scheduler.last_epoch == 30
    assert scheduler.get_last_lr() == [0.1 * S(30), 0.2 * S(30)]
    assert scheduler.base_lrs == [0.1, 0.2]
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)


def test_it_trains_as_lambda_lr_does():
    ours, theirs = new(), new()
    run(ours, ScheduleLR(ours, S), 25)
    run(theirs, lr_scheduler.LambdaLR(theirs, S), 25)
    assert_same(snapshot(ours), snapshot(theirs))


def test_a_schedule_for_each_group():
    opt = new(groups=3)
    each = [S, "linear(9)", constant()]
    got = run(opt, ScheduleLR(opt, each), 12)
    expected = [[0.1 * S(t), 0.2 * linear(9)(t), 0.1 * 3] for t in range(12)]
    assert got.tolist() == expected


@pytest.mark.parametrize("cls", ADAMS)
def test_weight_decay_and_betas(cls):
    opt = new(cls, 2, weight_decay=0.2, betas=(0.8, 0.9))
    scheduler = ScheduleLR(
        opt, S, weight_decay=[linear(8), "constant()"], betas=(cosine(9), [constant(), exponential(0.9)])
    )
    for t in range(12):
        first, second = opt.param_groups
        assert first["weight_decay"] == 0.2 * linear(8)(t)
        assert second["weight_decay"] == 0.2
        assert first["betas"] == (0.8 * cosine(9)(t), 0.9)
        assert second["betas"] == (0.8 * cosine(9)(t), 0.9 * exponential(0.9)(t))
        train(opt, 1, first=t)
        scheduler.step()


@pytest.mark.parametrize("cls", SGDS)
def test_momentum(cls):
    opt = new(cls, momentum=0.9)
    scheduler = ScheduleLR(opt, S, momentum=linear(8, end=0.5))
    for t in range(12):
        assert opt.param_groups[0]["momentum"] == 0.9 * linear(8, end=0.5)(t)
        train(opt, 1, first=t)
        scheduler.step()


@pytest.mark.parametrize("cls", ADAMS)
def test_momentum_is_the_first_beta(cls):
    opt = new(cls, betas=(0.8, 0.9))
    scheduler = ScheduleLR(opt, S, momentum=linear(8, end=0.5))
    run(opt, scheduler, 3)
    assert opt.param_groups[0]["betas"] == (0.8 * linear(8, end=0.5)(3), 0.9)
    assert opt.param_groups[0]["initial_betas"] == (0.8, 0.9)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_are_filled_in_place(shape, dtype):
    lr, beta, decay = (torch.full(shape, x, dtype=dtype) for x in (0.1, 0.9, 0.5))
    firsts = [x.item() for x in (lr, beta, decay)]
    opt = new(onepass.AdamW)
    opt.param_groups[0].update(lr=lr, betas=(beta, 0.99), weight_decay=decay)
    scheduler = ScheduleLR(opt, S, momentum=linear(40), weight_decay=linear(30))
    for t in range(8):
        group = opt.param_groups[0]
        assert group["lr"] is lr
        assert group["betas"][0] is beta
        assert group["weight_decay"] is decay
        factors = [S(t), linear(40)(t), linear(30)(t)]
        expected = [
            torch.full(shape, first, dtype=dtype) * factor for first, factor in zip(firsts, factors, strict=True)
        ]
        torch.testing.assert_close([lr, beta, decay], expected)  # float32 rounds the product once or twice
        train(opt, 1, first=t)
        scheduler.step()
    assert scheduler.base_lrs[0].tolist() == torch.full(shape, 0.1, dtype=dtype).tolist()


# -- resuming ----------------------------------------------------------------------------------------------------------


def full_run():
    opt = new(onepass.AdamW, 2, weight_decay=0.1)
    options = {"weight_decay": linear(20), "momentum": linear(30, end=0.3), "plateau": {"patience": 1, "factor": 0.5}}
    return opt, ScheduleLR(opt, [S, step(3)], **options)


def go_on(opt, scheduler, first, last):
    for t in range(first, last):
        train(opt, 1, first=t)
        if t % 3 == 2:
            scheduler.step(metrics=1.0 + t % 2)
        else:
            scheduler.step()


@pytest.mark.parametrize("stop", range(26))
def test_resumed_at_every_step_it_is_as_if_not_stopped(stop):
    opt, scheduler = full_run()
    go_on(opt, scheduler, 0, 26)
    before, other = full_run()
    go_on(before, other, 0, stop)
    file = io.BytesIO()
    torch.save([before.state_dict(), other.state_dict(), [p.detach() for p in params_of(before)]], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    after, resumed = full_run()
    with torch.no_grad():
        for p, q in zip(params_of(after), saved[2], strict=True):
            p.copy_(q)
    after.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert hypers(after) == hypers(before)
    assert resumed.get_last_lr() == other.get_last_lr()
    go_on(after, resumed, stop, 26)
    assert_same(snapshot(after), snapshot(opt))
    assert hypers(after) == hypers(opt)
    assert resumed.state_dict() == scheduler.state_dict()


@pytest.mark.parametrize("stop", range(1, 26))
def test_last_epoch_resumes_without_a_state_dict(stop):
    def both(opt, **options):
        return ScheduleLR(opt, S, weight_decay=linear(20), betas=(None, linear(900)), **options)

    whole = new(onepass.AdamW, 2)
    expected = run(whole, both(whole), 26)
    before = new(onepass.AdamW, 2)
    run(before, both(before), stop)
    after = new(onepass.AdamW, 2, lr=7.0)
    after.load_state_dict(before.state_dict())
    scheduler = both(after, last_epoch=stop - 1)
    assert scheduler.last_epoch == stop
    assert hypers(after) == hypers(before)
    assert run(after, scheduler, 26 - stop, first=stop).tolist() == expected[stop:].tolist()
    assert hypers(after) == hypers(whole)


def test_the_scheduler_alone_sets_the_rates_when_loaded():
    opt, scheduler = full_run()
    go_on(opt, scheduler, 0, 9)
    other, loaded = full_run()
    loaded.load_state_dict(scheduler.state_dict())
    assert [(g["lr"], g["weight_decay"], g["betas"]) for g in other.param_groups] == [
        (g["lr"], g["weight_decay"], g["betas"]) for g in opt.param_groups
    ]


def test_a_value_that_someone_has_set_is_saved():
    opt, scheduler = full_run()
    go_on(opt, scheduler, 0, 4)
    opt.param_groups[1].update(lr=0.7, weight_decay=0.6, betas=(0.5, 0.99))
    other, resumed = full_run()
    resumed.load_state_dict(scheduler.state_dict())
    for key in ("lr", "weight_decay"):
        assert [g[key] for g in other.param_groups] == [g[key] for g in opt.param_groups]
    assert [g["betas"][0] for g in other.param_groups] == [g["betas"][0] for g in opt.param_groups]
    assert resumed.get_last_lr() == [g["lr"] for g in opt.param_groups]
    state = scheduler.state_dict()
    del state["values"]  # as states were before
    resumed.load_state_dict(state)
    assert other.param_groups[1]["lr"] == 0.2 * step(3)(4)


def test_state_is_numbers_and_texts():
    _, scheduler = full_run()

    def plain(x):
        if isinstance(x, dict):
            return all(isinstance(key, str) and plain(value) for key, value in x.items())
        return all(map(plain, x)) if isinstance(x, list) else x is None or type(x) in (int, float, str, bool)

    state = scheduler.state_dict()
    assert plain(state)
    assert state["schedules"]["lr"] == ["warmup(5) >> cosine(15, end=0.1)", "step(3)"]


def test_another_schedule_is_told_of():
    opt, other = new(), new()
    scheduler = ScheduleLR(other, cosine(99))
    with pytest.warns(UserWarning, match=r"cosine\(9\) for lr of parameter group 0.*cosine\(99\)"):
        scheduler.load_state_dict(ScheduleLR(opt, cosine(9)).state_dict())
    with pytest.raises(ValueError, match="lr, weight_decay of 1 parameter groups, but this scheduler sets lr of 1"):
        scheduler.load_state_dict(ScheduleLR(opt, S, weight_decay=S).state_dict())
    with pytest.raises(ValueError, match="2 parameter groups"):
        scheduler.load_state_dict(ScheduleLR(new(groups=2), S).state_dict())


def test_a_second_scheduler_on_the_same_optimizer_begins_at_the_first_rate():
    """A user's report of torch's: a cosine that is made anew, after one that has come down to 0, sticks there."""
    opt = new()
    run(opt, ScheduleLR(opt, cosine(10)), 10)
    assert opt.param_groups[0]["lr"] == 0.0
    assert run(opt, ScheduleLR(opt, cosine(10)), 10, first=10)[:, 0].tolist() == [
        0.1 * cosine(10)(t) for t in range(10)
    ]


def test_within_torchs_sequential():
    opt = new()
    inner = [ScheduleLR(opt, linear(4, 0.5, 1.0), weight_decay=None), ScheduleLR(opt, S)]
    got = run(opt, lr_scheduler.SequentialLR(opt, inner, [4]), 12)
    assert got[:, 0].tolist() == [0.1 * (linear(4, 0.5, 1.0) >> S)(t) for t in range(12)]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("count_skipped", [True, False])
def test_copies(how, count_skipped):
    opt = new()
    scheduler = ScheduleLR(opt, S, count_skipped=count_skipped)
    run(opt, scheduler, 4)
    copied = how(scheduler)
    train(copied.optimizer, 1)
    copied.step()
    assert copied.optimizer.param_groups[0]["lr"] == 0.1 * S(5)
    assert opt.param_groups[0]["lr"] == 0.1 * S(4)


@pytest.mark.parametrize("count_skipped", [True, False])
def test_preview(count_skipped):
    opt = new(groups=2)
    scheduler = ScheduleLR(opt, S, weight_decay=S, plateau={"patience": 0, "factor": 0.5}, count_skipped=count_skipped)
    run(opt, scheduler, 3)
    before = [hypers(opt), scheduler.state_dict(), len(opt._optimizer_step_post_hooks)]
    assert scheduler.preview(30).tolist() == [[0.1 * S(t), 0.2 * S(t)] for t in range(3, 33)]
    halved = scheduler.preview(4, metrics=[1.0, 1.0, 2.0])
    assert halved[:, 0].tolist() == [0.1 * S(3), 0.1 * S(4), 0.05 * S(5), 0.025 * S(6)]
    assert [hypers(opt), scheduler.state_dict(), len(opt._optimizer_step_post_hooks)] == before


# -- plateau -----------------------------------------------------------------------------------------------------------

METRICS = [5.0, 4.0, 4.0, 4.1, 3.9, 4.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, math.nan, 3.0, 3.0, 2.0, 3.0, 3.0, 3.0]
PLATEAUS = [
    {"patience": 1},
    {"patience": 0, "factor": 0.3, "cooldown": 2},
    {"mode": "max", "patience": 2, "factor": 0.5},
    {"patience": 1, "threshold": 0.5, "threshold_mode": "abs", "min_lr": [0.02, 0.07]},
]


@pytest.mark.parametrize("options", PLATEAUS)
def test_a_plateau_alone_is_torchs(options):
    ours, theirs = new(groups=2), new(groups=2)
    scheduler = ScheduleLR(ours, constant(), plateau=options)
    torchs = lr_scheduler.ReduceLROnPlateau(theirs, **options)
    reduced = set()
    for t, metric in enumerate(METRICS):
        train(ours, 1, first=t)
        scheduler.step(metric)
        torchs.step(metric)
        rates = [g["lr"] for g in theirs.param_groups]
        assert [g["lr"] for g in ours.param_groups] == rates
        reduced.add(rates[0])
    assert len(reduced) > 1


@pytest.mark.parametrize("options", PLATEAUS)
def test_a_plateau_multiplies_what_the_schedule_says(options):
    ours, theirs = new(groups=2), new(groups=2)
    scheduler = ScheduleLR(ours, S, weight_decay=S, plateau=options)
    torchs = lr_scheduler.ReduceLROnPlateau(theirs, **options)
    for t, metric in enumerate(METRICS):
        train(ours, 1, first=t)
        scheduler.step()
        scheduler.feed(metric)  # which does not go on
        torchs.step(metric)
        assert scheduler.last_epoch == t + 1
        assert [g["lr"] for g in ours.param_groups] == [g["lr"] * S(t + 1) for g in theirs.param_groups]


# -- GradScaler --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*SGDS, *ADAMS, *FUSED_ADAMS])
@pytest.mark.parametrize("count_skipped", [True, False])
@pytest.mark.parametrize("unscale", [True, False])
def test_steps_that_gradscaler_skips(make, count_skipped, unscale):
    params = leaves([(3,), (2, 2)], torch.float32)
    opt = make(params)
    base = opt.param_groups[0]["lr"]
    scheduler = ScheduleLR(opt, S, count_skipped=count_skipped)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    skipped = 0
    for t in range(12):
        give_gradients(params, t)
        for p in params:
            p.grad = p.grad * scaler.scale(torch.ones(()))
        if t in (3, 4, 9):
            params[1].grad[1, 0] = math.inf if t == 4 else math.nan
        if unscale:
            scaler.unscale_(opt)
        before, scale = [p.detach().clone() for p in params], scaler.get_scale()
        scaler.step(opt)
        scaler.update()
        scheduler.step()
        if scaler.get_scale() < scale:
            skipped += 1
            assert_same([p.detach() for p in params], before)
        counted = t + 1 if count_skipped else t + 1 - skipped
        assert scheduler.last_epoch == counted
        assert opt.param_groups[0]["lr"] == base * S(counted)
    assert skipped == 3


WRAPS = {
    "bare": lambda opt: opt,
    "Lookahead": lambda opt: onepass.Lookahead(opt, k=2),
    "wrapped": AroundOther,
    "Lookahead, wrapped": lambda opt: AroundOther(onepass.Lookahead(opt, k=2)),
    "wrapped, Lookahead": lambda opt: onepass.Lookahead(AroundOther(opt), k=2),
}


@pytest.mark.parametrize("scales", [False, True], ids=["", "GradScaler"])
@pytest.mark.parametrize("count_skipped", [True, False])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_steps_that_the_optimizer_skips(wrap, count_skipped, scales):
    """By a norm that is not finite or by a policy, with GradScaler or without."""
    params = leaves([(3,), (2, 2)], torch.float32)
    policy = onepass.SkipSpikes(window=4)
    inner = onepass.SGD(params, lr=0.5, momentum=0.9, max_norm=policy, skip_nonfinite=True)
    opt = wrap(inner)
    scheduler = ScheduleLR(opt, S, count_skipped=count_skipped)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scales)
    skipped = 0
    for t in range(12):
        give_gradients(params, t)
        for p in params:
            p.grad = p.grad * scaler.scale(torch.ones(()))
        if t in (3, 9):
            params[1].grad[1, 0] = math.nan
        if t == 6:
            params[0].grad.mul_(1e4)
        before = [p.detach().clone() for p in params]
        scaler.step(opt)
        scaler.update()
        scheduler.step()
        if t in (3, 6, 9):
            skipped += 1
            assert_same([p.detach() for p in params], before)
        counted = t + 1 if count_skipped else t + 1 - skipped
        assert scheduler.last_epoch == counted
        assert opt.param_groups[0]["lr"] == 0.5 * S(counted)
    assert skipped == 3


@pytest.mark.parametrize("cls", SGDS)
def test_a_first_step_that_is_skipped_warns_of_nothing(cls):
    """torch's schedulers warn that they were stepped before the optimizer, when it was GradScaler that skipped it."""
    opt = new(cls)
    scheduler = ScheduleLR(opt, S, count_skipped=False)
    scheduler.step()
    assert scheduler.last_epoch == 0
    run(opt, scheduler, 2)
    assert scheduler.last_epoch == 2


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("wrap", [WRAPS["bare"], WRAPS["Lookahead"]], ids=["bare", "Lookahead"])
def test_copies_do_not_count_skipped_steps(wrap, how):
    """By a hook of their own: the copies and the originals do not see each other's steps."""

    def one_step(opt, gradient):
        for p in params_of(opt):
            p.grad = torch.full_like(p, gradient)
        opt.step()

    opt = wrap(new(skip_nonfinite=True))
    scheduler = ScheduleLR(opt, S, count_skipped=False)
    for _ in range(2):
        one_step(opt, 1.0)
        scheduler.step()
    one_step(opt, 1.0)  # both count it at their next call
    copied, its_scheduler = how((opt, scheduler))
    for each in (scheduler, its_scheduler, scheduler, its_scheduler):
        each.step()
    assert [scheduler.last_epoch, its_scheduler.last_epoch] == [3, 3]
    one_step(copied, 1.0)
    one_step(opt, math.nan)
    for each in (scheduler, its_scheduler):
        each.step()
    assert [scheduler.last_epoch, its_scheduler.last_epoch] == [3, 4]
    one_step(copied, math.nan)
    one_step(opt, 1.0)
    for each in (scheduler, its_scheduler):
        each.step()
    assert [scheduler.last_epoch, its_scheduler.last_epoch] == [4, 4]


def test_a_schedule_in_a_sequence_starts_before_the_optimizer_has_stepped():
    opt = new()
    first, second = (ScheduleLR(opt, S, count_skipped=False) for _ in range(2))
    scheduler = onepass.lr_scheduler.SequentialLR(opt, [first, second], [3])
    assert run(opt, scheduler, 7)[:, 0].tolist() == [0.1 * S(t) for t in (0, 1, 2, 0, 1, 2, 3)]


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("cls", SGDS)
def test_the_hook_goes_while_others_stay(cls, profiled):
    """torch's wrapper of a step, which steps of onepass have while a profiler runs, iterates over the hooks."""
    opt = new(cls)
    called = []
    scheduler = ScheduleLR(opt, S, count_skipped=False)
    for number in range(2):
        opt.register_step_post_hook(lambda *_, number=number: called.append(number))
    del scheduler
    gc.collect()
    with torch.profiler.profile() if profiled else contextlib.nullcontext():
        train(opt, 1)
    assert called == [0, 1]
    assert len(opt._optimizer_step_post_hooks) == 2


def test_the_hook_goes_with_its_scheduler():
    opt = new()
    scheduler = ScheduleLR(opt, S, count_skipped=False)
    assert len(opt._optimizer_step_post_hooks) == 1
    del scheduler
    gc.collect()
    train(opt)
    assert len(opt._optimizer_step_post_hooks) == 0
    assert len(new()._optimizer_step_post_hooks) == 0


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "why"),
    [
        (lambda: ScheduleLR(3, S), TypeError, "^ScheduleLR: optimizer must be a torch.optim.Optimizer, got the int 3$"),
        (
            lambda: ScheduleLR(new(), 3),
            TypeError,
            "schedule must be a Schedule of .*, or the text of one, got the int 3$",
        ),
        (
            lambda: ScheduleLR(new(), lambda t: 1.0),
            TypeError,
            "got the function <f.*: schedules.function.*LambdaLR takes",
        ),
        (lambda: ScheduleLR(new(), "cosin(3)"), ValueError, "schedule: at position 1, there is no part 'cosin'"),
        (
            lambda: ScheduleLR(new(groups=3), [S, S]),
            ValueError,
            "schedule must be .* for each of 3 parameter groups, got 2",
        ),
        (
            lambda: ScheduleLR(new(), S, weight_decay=[S, S]),
            ValueError,
            "weight_decay must be .* for each of 1 .*, got 2",
        ),
        (lambda: ScheduleLR(new(), S, betas=(S, S)), ValueError, "betas: parameter group 0 has no such beta"),
        (lambda: ScheduleLR(new(onepass.AdamW), S, betas=(S, S, S)), ValueError, "betas: parameter group 0"),
        (lambda: ScheduleLR(new(onepass.AdamW), S, betas=S), TypeError, "betas must be a tuple"),
        (
            lambda: ScheduleLR(new(onepass.AdamW), S, momentum=S, betas=(S, None)),
            ValueError,
            "betas: the first beta must be None, because momentum",
        ),
        (lambda: ScheduleLR(new(onepass.Adagrad), S, momentum=S), ValueError, "momentum: parameter group 0"),
        (lambda: ScheduleLR(new(onepass.Rprop), S, weight_decay=S), ValueError, "weight_decay: parameter group 0"),
        (lambda: ScheduleLR(new(), S, plateau={"patient": 3}), TypeError, "plateau: .*patient"),
        (lambda: ScheduleLR(new(), S, plateau={"factor": 3}), ValueError, "plateau: "),
        (
            lambda: ScheduleLR(new(), S, plateau=True),
            TypeError,
            "plateau must be a dict of arguments .*got the bool True",
        ),
        (lambda: ScheduleLR(new(), S).step(1.0), ValueError, "metrics: "),
        (lambda: ScheduleLR(new(), S).feed(1.0), ValueError, "metrics: "),
        (lambda: ScheduleLR(new(), S, last_epoch=3), KeyError, "initial_lr"),
        (lambda: ScheduleLR(new(), S, weight_decay=S, last_epoch=3), KeyError, "initial_weight_decay"),
        (lambda: ScheduleLR(new(), S, last_epoch=1.5), TypeError, "ScheduleLR: last_epoch must be an integer >= -1"),
        (lambda: ScheduleLR(new(), S, last_epoch="x"), TypeError, "ScheduleLR: last_epoch must be an integer >= -1"),
        (lambda: ScheduleLR(new(), S, last_epoch=-7), ValueError, "ScheduleLR: last_epoch must be >= -1, got -7"),
        (
            lambda: ScheduleLR(new(), S, count_skipped="no"),
            TypeError,
            "count_skipped must be True or False, got .*'no'",
        ),
        (lambda: ScheduleLR(new(), S, plateau={}).step("x"), TypeError, "metrics must be a number, got the str 'x'"),
        (lambda: ScheduleLR(new(), S, plateau={}).feed(None), TypeError, "metrics must be a number, got the NoneType"),
        (lambda: ScheduleLR(new(), S, plateau={}).feed(torch.ones(2)), ValueError, "metrics must be one number"),
        (
            lambda: ScheduleLR(new(onepass.AdamW), S, betas=(None, constant(value=1.01))),
            ValueError,
            r"betas\[1\] of parameter group 0 would be 1.00899.* at step 0",
        ),
        (lambda: ScheduleLR(new(), function(lambda t: "x")), ValueError, "could not convert"),
    ],
)
def test_bad_input_is_named(make, error, why):
    with pytest.raises(error, match=why):
        make()


def not_a_number(t):
    raise ArithmeticError(f"no value at {t}")


FAILING = {
    "plateau": ({"plateau": {"patiense": 3}}, TypeError),
    "min_lr": ({"plateau": {"min_lr": [0.1, 0.2, 0.3]}}, ValueError),
    "number of betas": ({"betas": (None, "linear(3)", "linear(3)")}, ValueError),
    "first beta": ({"betas": ("linear(3)",)}, ValueError),
    "text": ({"betas": (None, "linear(3")}, ValueError),
    "range of a beta": ({"betas": (None, constant(value=1.5))}, ValueError),
    "function": ({"schedule": function(not_a_number)}, ArithmeticError),
    "last_epoch": ({"last_epoch": 3}, KeyError),
}


@pytest.mark.parametrize("cls", ADAMS)
@pytest.mark.parametrize(("options", "error"), FAILING.values(), ids=FAILING)
def test_a_constructor_that_fails_changes_nothing(cls, options, error):
    opt = new(cls, 2, weight_decay=0.1)
    before = hypers(opt), list(vars(opt)), list(opt._optimizer_step_post_hooks)
    options = {"schedule": S, "weight_decay": linear(3), "momentum": linear(9), "count_skipped": False, **options}
    with pytest.raises(error):
        ScheduleLR(opt, **options)
    gc.collect()
    assert (hypers(opt), list(vars(opt)), list(opt._optimizer_step_post_hooks)) == before
    for group in opt.param_groups:
        group.update(weight_decay=0.5, betas=(0.6, 0.7), lr=0.3)
    ScheduleLR(opt, linear(9), weight_decay=linear(3), betas=(constant(), linear(9)))
    assert [(g["lr"], g["weight_decay"], g["betas"]) for g in opt.param_groups] == [(0.3, 0.5, (0.6, 0.7))] * 2


# -- transformers ------------------------------------------------------------------------------------------------------

N = 100
FAMILY = [
    ("get_constant_schedule", {}),
    ("get_constant_schedule_with_warmup", {"num_warmup_steps": 10}),
    ("get_constant_schedule_with_warmup", {"num_warmup_steps": 0}),
    ("get_linear_schedule_with_warmup", {"num_warmup_steps": 10, "num_training_steps": N}),
    ("get_linear_schedule_with_warmup", {"num_warmup_steps": 0, "num_training_steps": N}),
    ("get_cosine_schedule_with_warmup", {"num_warmup_steps": 10, "num_training_steps": N}),
    ("get_cosine_schedule_with_warmup", {"num_warmup_steps": 7, "num_training_steps": N, "num_cycles": 2.3}),
    ("get_cosine_with_hard_restarts_schedule_with_warmup", {"num_warmup_steps": 10, "num_training_steps": N}),
    (
        "get_cosine_with_hard_restarts_schedule_with_warmup",
        {"num_warmup_steps": 10, "num_training_steps": N, "num_cycles": 7},
    ),
    ("get_polynomial_decay_schedule_with_warmup", {"num_warmup_steps": 10, "num_training_steps": N}),
    (
        "get_polynomial_decay_schedule_with_warmup",
        {"num_warmup_steps": 3, "num_training_steps": N, "lr_end": 1e-3, "power": 2.5},
    ),
    ("get_inverse_sqrt_schedule", {"num_warmup_steps": 10}),
    ("get_inverse_sqrt_schedule", {"num_warmup_steps": 0}),
    ("get_inverse_sqrt_schedule", {"num_warmup_steps": 10, "timescale": 33}),
    (
        "get_cosine_with_min_lr_schedule_with_warmup",
        {"num_warmup_steps": 10, "num_training_steps": N, "min_lr": 0.01},
    ),
    (
        "get_cosine_with_min_lr_schedule_with_warmup",
        {"num_warmup_steps": 10, "num_training_steps": N, "min_lr_rate": 0.2, "num_cycles": 1.2},
    ),
    *(
        (
            "get_wsd_schedule",
            {
                "num_warmup_steps": 10,
                "num_decay_steps": 20,
                "num_stable_steps": 30,
                "warmup_type": rise,
                "decay_type": fall,
                "min_lr_ratio": low,
                "num_cycles": cycles,
            },
        )
        for rise in ("linear", "cosine", "1-sqrt")
        for fall in ("linear", "cosine", "1-sqrt")
        for low, cycles in [(0, 0.5), (0.1, 0.8)]
    ),
    ("get_wsd_schedule", {"num_warmup_steps": 10, "num_decay_steps": 20, "num_training_steps": N}),
]


@pytest.mark.parametrize(("name", "options"), FAMILY, ids=[name for name, _ in FAMILY])
def test_transformers(name, options):
    """To 1e-12 of the first rate, as both round near the end of a cosine, up to the last training step."""
    from transformers import optimization  # not at the top: it takes seconds

    groups = 1 if options.keys() & {"min_lr", "lr_end"} or "polynomial" in name else 2  # a last rate is each group's
    ours, theirs = new(groups=groups, lr=0.1), new(groups=groups, lr=0.1)
    for opt in (ours, theirs):
        opt.defaults["lr"] = 0.1
    n = options.get("num_training_steps", 150) + 1
    got = run(ours, getattr(family, name)(ours, **options), n)
    expected = run(theirs, getattr(optimization, name)(theirs, **options), n)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)
    resumed = getattr(family, name)(ours, **options, last_epoch=40)
    torchs = getattr(optimization, name)(theirs, **options, last_epoch=40)
    np.testing.assert_allclose(resumed.get_last_lr(), torchs.get_last_lr(), rtol=1e-12, atol=1e-13)


def test_transformers_signatures():
    import inspect

    from transformers import optimization  # not at the top: it takes seconds

    for name in set(family.__all__):
        ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (family, optimization))
        assert {n: p.default for n, p in ours.items()} == {n: p.default for n, p in theirs.items()}, name
        assert list(ours) == list(theirs)


@pytest.mark.parametrize("name", ["get_cosine_schedule_with_warmup", "get_linear_schedule_with_warmup"])
def test_after_the_last_training_step_the_rate_is_held(name):
    opt = new()
    assert run(opt, getattr(family, name)(opt, 5, 10), 30)[10:, 0].tolist() == [0.0] * 20


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda o: family.get_wsd_schedule(o, 1, 2), "num_training_steps, num_stable_steps"),
        (lambda o: family.get_wsd_schedule(o, 1, 2, 9, warmup_type="x"), "warmup_type: 'x'"),
        (lambda o: family.get_wsd_schedule(o, 1, 2, 9, decay_type="x"), "decay_type: 'x'"),
        (lambda o: family.get_cosine_with_min_lr_schedule_with_warmup(o, 1, 2), "min_lr, min_lr_rate"),
        (lambda o: family.get_polynomial_decay_schedule_with_warmup(o, 1, 2, lr_end=1.0), "lr_end"),
        (lambda o: family.get_linear_schedule_with_warmup(o, -1, 2), "num_warmup_steps must be >= 0, got -1"),
    ],
)
def test_bad_arguments_of_the_family(make, why):
    with pytest.raises(ValueError, match=why):
        make(torch.optim.SGD(leaves([(3,)]), lr=0.1))


def test_wsd_with_both_counts_warns():
    with pytest.warns(UserWarning, match="num_stable_steps"):
        family.get_wsd_schedule(new(), 1, 2, 9, 3)


def test_a_function_of_ones_own_is_known_again_in_the_next_process():
    def schedule():
        def decay(t):
            return 0.9**t

        return ScheduleLR(new(), function(decay))

    schedule().load_state_dict(schedule().state_dict())  # a warning would be an error


def test_the_state_of_another_scheduler_is_refused():
    scheduler = ScheduleLR(new(), S)
    with pytest.raises(ValueError, match="state_dict is not that of a ScheduleLR"):
        scheduler.load_state_dict(lr_scheduler.StepLR(new(), 3).state_dict())


def test_no_betas_beside_a_momentum():
    scheduler = ScheduleLR(new(onepass.AdamW), S, momentum=constant(), betas=())
    assert scheduler.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


# -- parameter groups that are added in mid-run ------------------------------------------------------------------------


def add_group(opt, **options):
    opt.add_param_group({"params": leaves([(3,)], seed=9), "lr": 0.7, **options})


@pytest.mark.parametrize("cls", ADAMS)
def test_a_group_is_taken_up_where_one_schedule_serves_all(cls):
    opt = new(cls, 2, weight_decay=0.2, betas=(0.8, 0.9))
    scheduler = ScheduleLR(opt, S, weight_decay=linear(40), betas=(None, linear(50)), plateau={"patience": 0})
    run(opt, scheduler, 3)
    scheduler.feed(1.0)
    scheduler.feed(1.0)
    add_group(opt, weight_decay=0.5, betas=(0.7, 0.6))
    assert opt.param_groups[2]["lr"] == 0.7
    train(opt, 1)
    scheduler.step()
    assert [g["lr"] for g in opt.param_groups] == [0.1 * 0.1 * S(4), 0.2 * 0.1 * S(4), 0.7 * S(4)]
    assert [g["weight_decay"] for g in opt.param_groups] == [w * linear(40)(4) for w in (0.2, 0.2, 0.5)]
    assert [g["betas"] for g in opt.param_groups] == [
        (b, c * linear(50)(4)) for b, c in ((0.8, 0.9), (0.8, 0.9), (0.7, 0.6))
    ]
    assert [opt.param_groups[2][f"initial_{key}"] for key in ("lr", "weight_decay", "betas")] == [0.7, 0.5, (0.7, 0.6)]
    scheduler.feed(1.0)  # which takes them all
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([0.001 * S(4), 0.002 * S(4), 0.07 * S(4)], rel=1e-14)
    other = new(cls, 3, weight_decay=0.2, betas=(0.8, 0.9))
    other.load_state_dict(opt.state_dict())
    resumed = ScheduleLR(other, S, weight_decay=linear(40), betas=(None, linear(50)), plateau={"patience": 0})
    resumed.load_state_dict(scheduler.state_dict())
    train(opt, 1)
    train(other, 1)
    scheduler.step()
    resumed.step()
    assert hypers(other) == hypers(opt)


def test_the_schedules_of_transformers_take_up_a_group():
    opt = new(groups=2)
    scheduler = family.get_cosine_schedule_with_warmup(opt, 3, 20)
    run(opt, scheduler, 4)
    add_group(opt)
    run(opt, scheduler, 1)
    assert opt.param_groups[2]["lr"] == 0.7 * (warmup(3) >> cosine(17))(5)


@pytest.mark.parametrize(
    ("make", "options", "why"),
    [
        (
            lambda o, p: ScheduleLR(o, [S, "linear(9)"], plateau=p),
            {},
            "schedule: parameter group 2 was added .* different schedules",
        ),
        (
            lambda o, p: ScheduleLR(o, S, momentum=[S, "linear(9)"], plateau=p),
            {},
            "momentum: parameter group 2 was added",
        ),
        (
            lambda o, p: ScheduleLR(o, S, plateau={**p, "min_lr": [0.1, 0.2]}),
            {},
            "plateau: parameter group 2 was added .*min_lr",
        ),
        (
            lambda o, p: ScheduleLR(o, S, momentum=S, plateau=p),
            {"momentum": None},
            "momentum: parameter group 2 has no momentum",
        ),
    ],
)
@pytest.mark.parametrize("how", ["step", "feed", "metrics"])
def test_a_group_that_is_not_provided_for_is_refused_before_anything_moves(make, options, why, how):
    opt = new(groups=2, momentum=0.9)
    scheduler = make(opt, {"patience": 1})
    run(opt, scheduler, 3)
    add_group(opt)
    opt.param_groups[2].update(options)
    before = [str(scheduler.state_dict()), hypers(opt)]
    with pytest.raises(ValueError, match=why):
        {"step": scheduler.step, "feed": lambda: scheduler.feed(1.0), "metrics": lambda: scheduler.step(1.0)}[how]()
    assert [str(scheduler.state_dict()), hypers(opt)] == before


def test_a_schedule_that_fails_changes_nothing():
    opt = new(onepass.AdamW, betas=(0.9, 0.5))
    scheduler = ScheduleLR(opt, S, weight_decay=linear(9), betas=(None, function(lambda t: 1.0 + t // 3)))
    run(opt, scheduler, 2)
    before = [str(scheduler.state_dict()), hypers(opt)]
    with pytest.raises(ValueError, match=r"betas\[1\] of parameter group 0 would be 1.0 at step 3"):
        scheduler.step()
    assert [str(scheduler.state_dict()), hypers(opt)] == before


@pytest.mark.parametrize("count_skipped", [True, False])
def test_a_schedule_that_fails_leaves_the_plateau_as_it_is(count_skipped):
    opt = new(onepass.AdamW, betas=(0.9, 0.5))
    late = function(lambda t: 1.0 + t // 3)
    scheduler = ScheduleLR(
        opt, S, betas=(None, late), plateau={"patience": 0, "factor": 0.5}, count_skipped=count_skipped
    )
    run(opt, scheduler, 2)
    scheduler.feed(1.0)
    train(opt, 1)
    before = [str(scheduler.state_dict()), hypers(opt)]
    for _ in range(2):  # also if the optimizer has not stepped since
        with pytest.raises(ValueError, match=r"betas\[1\] of parameter group 0 would be 1.0 at step 3"):
            scheduler.step(2.0)
        assert [str(scheduler.state_dict()), hypers(opt)] == before
    for metrics in ("x", [1.0], torch.ones(2)):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            scheduler.step(metrics)
        assert [str(scheduler.state_dict()), hypers(opt)] == before


@pytest.mark.parametrize("how", ["step", "feed", "metrics"])
def test_an_added_group_whose_beta_would_leave_its_range_changes_nothing(how):
    opt = new(onepass.AdamW, betas=(0.9, 0.5))
    scheduler = ScheduleLR(opt, S, betas=(None, constant(value=1.5)), plateau={"patience": 0})
    run(opt, scheduler, 2)
    add_group(opt, betas=(0.9, 0.8))
    before = hypers(opt), {**vars(scheduler)}
    call = {"step": scheduler.step, "feed": lambda: scheduler.feed(1.0), "metrics": lambda: scheduler.step(1.0)}[how]
    with pytest.raises(ValueError, match=r"betas\[1\] of parameter group 1 would be 1.2"):
        call()
    assert (hypers(opt), vars(scheduler)) == before
    opt.param_groups[1]["betas"] = (0.9, 0.6)
    call()
    assert opt.param_groups[1]["betas"] == (0.9, 0.6 * 1.5)


def test_a_plateau_is_fed_before_its_part_of_a_sequence_starts():
    opt = new()
    parts = [ScheduleLR(opt, constant()), ScheduleLR(opt, S, plateau={"patience": 0, "factor": 0.5})]
    scheduler = onepass.lr_scheduler.SequentialLR(opt, parts, [3])
    parts[1].feed(1.0)
    parts[1].feed(2.0)
    assert opt.param_groups[0]["lr"] == 0.1
    assert run(opt, scheduler, 5)[:, 0].tolist() == [0.1, 0.1, 0.1, 0.05 * S(0), 0.05 * S(1)]


DAMAGED = {
    "base of a beta": lambda state: state["bases"].update({"betas[0]": [0.9, 4.0]}),
    "number of bases": lambda state: state["bases"].update({"betas[0]": [0.9]}),
    "number of values": lambda state: state["values"].update({"weight_decay": [0.9]}),
    "no values of a hyperparameter": lambda state: state["values"].pop("weight_decay"),
    "no schedules of a hyperparameter": lambda state: state["schedules"].pop("weight_decay"),
    "no plateau": lambda state: state.pop("plateau"),
    "no rates of the plateau": lambda state: state["plateau"].update({"_last_lr": []}),
    "no count": lambda state: state.pop("_step_count"),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("in_a_chain", [False, True])
def test_a_state_that_cannot_be_loaded_changes_nothing(damage, in_a_chain):
    def make():
        opt, scheduler = full_run()
        if in_a_chain:
            chain = onepass.lr_scheduler.ChainedScheduler
            scheduler = chain([onepass.lr_scheduler.ExponentialLR(opt, 0.9), scheduler])
        return opt, scheduler

    before, saved = make()
    run(before, saved, 9)
    state = copy.deepcopy(saved.state_dict())
    damage(state["_schedulers"][1] if in_a_chain else state)
    opt, scheduler = make()
    run(opt, scheduler, 2)
    expected = str(scheduler.state_dict()), hypers(opt)
    with pytest.raises((KeyError, ValueError)):
        scheduler.load_state_dict(state)
    assert (str(scheduler.state_dict()), hypers(opt)) == expected


def test_a_state_without_a_plateau_resets_the_plateau():
    saved = ScheduleLR(new(), constant())
    opt = new()
    scheduler = ScheduleLR(opt, constant(), plateau={"patience": 0, "factor": 0.5})
    scheduler.feed(1.0)
    scheduler.feed(1.0)
    assert opt.param_groups[0]["lr"] == 0.05
    scheduler.load_state_dict(saved.state_dict())
    assert opt.param_groups[0]["lr"] == 0.1
    scheduler.feed(2.0)  # the first metric
    assert opt.param_groups[0]["lr"] == 0.1


def test_a_group_that_is_gone_is_told_of():
    opt = new(groups=3)
    scheduler = ScheduleLR(opt, S)
    del opt.param_groups[1]
    with pytest.raises(ValueError, match="the optimizer has 2 parameter groups, this ScheduleLR was made for 3"):
        scheduler.step()
    assert scheduler.last_epoch == 0


def test_a_group_within_torchs_sequential_is_taken_up():
    opt = new(groups=2)
    scheduler = lr_scheduler.SequentialLR(opt, [ScheduleLR(opt, linear(4)), ScheduleLR(opt, S)], [2])
    add_group(opt)
    run(opt, scheduler, 4)
    assert [g["lr"] for g in opt.param_groups] == [0.1 * S(2), 0.2 * S(2), 0.7 * S(2)]


# -- base values -------------------------------------------------------------------------------------------------------


def test_another_base_is_told_of():
    before = ScheduleLR(new(onepass.AdamW, weight_decay=0.1), S, weight_decay=S)
    other = new(onepass.AdamW, lr=0.4, weight_decay=0.3)
    scheduler = ScheduleLR(other, S, weight_decay=S)
    with pytest.warns(UserWarning, match="made with a base of") as told:
        scheduler.load_state_dict(before.state_dict())
    assert [str(w.message).split("; ")[0] for w in told] == [
        "state_dict was made with a base of 0.1 for lr of parameter group 0, not 0.4",
        "state_dict was made with a base of 0.1 for weight_decay of parameter group 0, not 0.3",
    ]
    train(other, 1)
    scheduler.step()
    assert other.param_groups[0]["lr"] == 0.1 * S(1)
    scheduler.base_lrs = [0.4]
    scheduler.step()
    assert other.param_groups[0]["lr"] == 0.4 * S(2)


def test_a_base_that_was_not_given_here_is_not_told_of():
    """OneCycleLR sets initial_lr, from which a ScheduleLR on the loaded optimizer has its base."""

    def make(opt):
        parts = [ScheduleLR(opt, S), onepass.lr_scheduler.OneCycleLR(opt, 0.5, 20)]
        return onepass.lr_scheduler.SequentialLR(opt, parts, [5])

    before = new(momentum=0.9)
    scheduler = make(before)
    run(before, scheduler, 3)
    after = new(momentum=0.9)
    after.load_state_dict(before.state_dict())
    resumed = make(after)
    resumed.load_state_dict(scheduler.state_dict())  # a warning would be an error
    assert run(after, resumed, 5, first=3).tolist() == run(before, scheduler, 5, first=3).tolist()


def test_the_same_base_in_another_dtype_is_not_told_of():
    opt = new()
    opt.param_groups[0]["lr"] = torch.tensor(0.1)
    scheduler = ScheduleLR(new(), S)
    scheduler.load_state_dict(ScheduleLR(opt, S).state_dict())  # a warning would be an error


@pytest.mark.parametrize("in_place", [False, True])
def test_base_lrs_that_are_set_beside_a_plateau_take_effect(in_place):
    opt = new(groups=2)
    scheduler = ScheduleLR(opt, constant(), plateau={"patience": 0, "factor": 0.5})
    train(opt, 1)
    scheduler.step(1.0)
    scheduler.step(1.0)
    assert [g["lr"] for g in opt.param_groups] == [0.05, 0.1]
    if in_place:
        scheduler.base_lrs[0] = 0.8
    else:
        scheduler.base_lrs = [0.8, 0.2]
    state = scheduler.state_dict()
    scheduler.step()
    assert [g["lr"] for g in opt.param_groups] == [0.4, 0.1]  # the plateau's half stays
    scheduler.step(1.0)
    assert [g["lr"] for g in opt.param_groups] == [0.2, 0.05]
    other = new(groups=2)
    resumed = ScheduleLR(other, constant(), plateau={"patience": 0, "factor": 0.5})
    with pytest.warns(UserWarning, match="base of 0.8"):
        resumed.load_state_dict(state)
    assert resumed.base_lrs == [0.8, 0.2]
    assert [g["lr"] for g in other.param_groups] == [0.05, 0.1]  # as when the state was saved
    train(other, 1)
    resumed.step()
    assert [g["lr"] for g in other.param_groups] == [0.4, 0.1]


@pytest.mark.parametrize("bases", [[0.4], [0.4, 0.3, 0.2]])
@pytest.mark.parametrize("plateau", [None, {"patience": 0}])
def test_base_lrs_of_another_number_change_nothing(bases, plateau):
    opt = new(groups=2)
    scheduler = ScheduleLR(opt, S, plateau=plateau)
    run(opt, scheduler, 2)
    before = str(scheduler.state_dict())
    valid, scheduler.base_lrs = scheduler.base_lrs, bases
    for call in (scheduler.step, *((lambda: scheduler.feed(1.0), lambda: scheduler.step(1.0)) if plateau else ())):
        with pytest.raises(ValueError, match=f"^base_lrs must have one rate for each of 2 .*, got {len(bases)}$"):
            call()
    scheduler.base_lrs = valid
    assert str(scheduler.state_dict()) == before


def test_a_run_is_not_resumed_at_a_step_that_is_none():
    opt = new()
    ScheduleLR(opt, S)
    before = hypers(opt)
    for last_epoch in (-2, 1.5):
        with pytest.raises((TypeError, ValueError), match="last_epoch"):
            ScheduleLR(opt, S, last_epoch=last_epoch)
        assert hypers(opt) == before


def test_base_lrs_that_are_set_before_the_plateau_has_done_anything():
    opt = new()
    scheduler = ScheduleLR(opt, S, plateau={"patience": 3})
    scheduler.base_lrs = [0.3]
    run(opt, scheduler, 2)
    assert opt.param_groups[0]["lr"] == 0.3 * S(2)


def test_repr():
    assert repr(ScheduleLR(new(), S)) == "ScheduleLR(SGD, 'warmup(5) >> cosine(15, end=0.1)', last_epoch=0)"
    scheduler = ScheduleLR(
        new(torch.optim.AdamW, 2), ["step(3)", constant()], weight_decay="linear(3)", betas=(None, "linear(9)"),
        plateau={"factor": 0.5},
    )  # fmt: skip
    assert repr(scheduler) == (
        "ScheduleLR(AdamW, ['step(3)', 'constant()'], weight_decay='linear(3)', betas[1]='linear(9)', "
        "plateau={'mode': 'min', 'factor': 0.5, ...}, last_epoch=0)"
    )


# -- transformers: numbers of steps, last rates, names -----------------------------------------------------------------

W, TOTAL = 0.1 * 155, 100.4
FRACTIONS = [
    ("get_constant_schedule_with_warmup", {"num_warmup_steps": W}),
    ("get_linear_schedule_with_warmup", {"num_warmup_steps": W, "num_training_steps": 100}),
    ("get_linear_schedule_with_warmup", {"num_warmup_steps": 0.1 * 100, "num_training_steps": 1e2}),
    ("get_linear_schedule_with_warmup", {"num_warmup_steps": 10, "num_training_steps": TOTAL}),
    ("get_cosine_schedule_with_warmup", {"num_warmup_steps": W, "num_training_steps": 100}),
    ("get_cosine_schedule_with_warmup", {"num_warmup_steps": W, "num_training_steps": TOTAL, "num_cycles": 2.3}),
    ("get_cosine_with_hard_restarts_schedule_with_warmup", {"num_warmup_steps": W, "num_training_steps": 100}),
    (
        "get_cosine_with_hard_restarts_schedule_with_warmup",
        {"num_warmup_steps": 0.3, "num_training_steps": TOTAL, "num_cycles": 7},
    ),
    (
        "get_cosine_with_hard_restarts_schedule_with_warmup",
        {"num_warmup_steps": 3, "num_training_steps": 100, "num_cycles": 2.4},
    ),
    ("get_polynomial_decay_schedule_with_warmup", {"num_warmup_steps": W, "num_training_steps": 100, "power": 2.5}),
    ("get_inverse_sqrt_schedule", {"num_warmup_steps": W}),
    ("get_inverse_sqrt_schedule", {"num_warmup_steps": W, "timescale": 33.3}),
    (
        "get_cosine_with_min_lr_schedule_with_warmup",
        {"num_warmup_steps": W, "num_training_steps": 100, "min_lr_rate": 0.2},
    ),
    *(
        (
            "get_wsd_schedule",
            {
                "num_warmup_steps": W,
                "num_decay_steps": 20.7,
                "num_stable_steps": 30.2,
                "warmup_type": kind,
                "decay_type": kind,
                "min_lr_ratio": 0.1,
            },
        )
        for kind in ("linear", "cosine", "1-sqrt")
    ),
    ("get_wsd_schedule", {"num_warmup_steps": W, "num_decay_steps": 0.2 * 100, "num_training_steps": 100}),
]


@pytest.mark.parametrize(("name", "options"), FRACTIONS)
def test_numbers_of_steps_that_are_not_whole(name, options):
    from transformers import optimization  # not at the top: it takes seconds

    ours, theirs = new(), new()
    ours.defaults["lr"] = theirs.defaults["lr"] = 0.1
    n = math.ceil(options.get("num_training_steps", 150))
    got = run(ours, getattr(family, name)(ours, **options), n)
    expected = run(theirs, getattr(optimization, name)(theirs, **options), n)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)
    assert np.unique(got).size > 10


def test_schedules_that_differ_by_a_part_of_a_step_are_told_apart():
    scheduler = family.get_linear_schedule_with_warmup(new(), W, 100)
    assert repr(scheduler.schedules[0]) == "warmup(15.5) >> linear(84.5)"
    other = family.get_linear_schedule_with_warmup(new(), 16, 100)
    with pytest.warns(UserWarning, match=r"made with warmup\(15.5\) >> linear\(84.5\)"):
        other.load_state_dict(scheduler.state_dict())
    copied = pickle.loads(pickle.dumps(scheduler))
    assert copied.schedules == scheduler.schedules
    assert scheduler.preview(20).tolist() == copied.preview(20).tolist()


@pytest.mark.parametrize(
    ("make", "error", "why"),
    [
        (lambda o: family.get_cosine_schedule_with_warmup(o, "3", 9), TypeError, "num_warmup_steps must be .*'3'"),
        (
            lambda o: family.get_cosine_schedule_with_warmup(o, 3, math.inf),
            TypeError,
            "num_training_steps must be .*inf",
        ),
        (lambda o: family.get_cosine_schedule_with_warmup(o, 3, None), TypeError, "num_training_steps must be .*None"),
        (lambda o: family.get_cosine_schedule_with_warmup(o, 3, 9, "x"), TypeError, "num_cycles must be "),
        (lambda o: family.get_wsd_schedule(o, 3, -1, 9), ValueError, "num_decay_steps must be >= 0, got -1"),
        (lambda o: family.get_wsd_schedule(o, 3, 1, None, -0.5), ValueError, "num_stable_steps must be >= 0"),
        (lambda o: family.get_inverse_sqrt_schedule(o, 3, -1), ValueError, "timescale must be >= 0, got -1"),
        (lambda o: family.get_inverse_sqrt_schedule(o, 3, 0), ValueError, "timescale must be > 0, got 0"),
        (
            lambda o: family.get_cosine_with_hard_restarts_schedule_with_warmup(o, 3, 9, 0),
            ValueError,
            "num_cycles must be > 0, got 0",
        ),
        (
            lambda o: family.get_polynomial_decay_schedule_with_warmup(o, 3, 9, power=0),
            ValueError,
            "power must be > 0, got 0",
        ),
        (
            lambda o: family.get_polynomial_decay_schedule_with_warmup(o, 3, 9, lr_end="x"),
            TypeError,
            "lr_end must be a finite number, got 'x'",
        ),
        (lambda o: family.get_polynomial_decay_schedule_with_warmup(3, 3, 9), TypeError, "optimizer must be a torch"),
        (
            lambda o: family.get_cosine_with_min_lr_schedule_with_warmup(3, 3, 9, min_lr=0.1),
            TypeError,
            "optimizer must be a torch",
        ),
    ],
)
def test_errors_of_the_family_name_the_argument(make, error, why):
    with pytest.raises(error, match=why):
        make(new())


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_last_rate_is_that_of_every_group(tensor_lr):
    def fresh():
        opt = new(torch.optim.AdamW, 3)  # whose default for lr is 1e-3
        for group in opt.param_groups if tensor_lr else ():
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
        return opt

    opt = fresh()
    got = run(opt, family.get_cosine_with_min_lr_schedule_with_warmup(opt, 2, 10, min_lr=0.01), 12)
    assert got[2].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert got[-1].tolist() == pytest.approx([0.01, 0.01, 0.01], rel=1e-12)
    opt = fresh()
    scheduler = family.get_polynomial_decay_schedule_with_warmup(opt, 2, 10, lr_end=0.02)
    assert run(opt, scheduler, 12)[-1].tolist() == pytest.approx([0.02, 0.02, 0.02], rel=1e-12)
    again = family.get_polynomial_decay_schedule_with_warmup(opt, 2, 10, lr_end=0.02, last_epoch=5)
    assert again.schedules == scheduler.schedules  # by the first rates, not by those that the groups have now
    with pytest.raises(ValueError, match=r"lr_end must be below .* got 0.1; that of group 0 is 0.1"):
        family.get_polynomial_decay_schedule_with_warmup(fresh(), 2, 10, lr_end=0.1)


def test_a_group_whose_rate_is_zero_has_no_last_rate():
    opt = new(groups=2)
    opt.param_groups[1]["lr"] = 0.0
    scheduler = family.get_polynomial_decay_schedule_with_warmup(opt, 2, 10)
    assert run(opt, scheduler, 12)[:, 1].tolist() == [0.0] * 12


NAMED = {
    "linear": {},
    "cosine": {"num_cycles": 1.5},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"power": 2.0, "lr_end": 1e-4},
    "constant": {"ignored": 3},
    "constant_with_warmup": {"ignored": 3},
    "inverse_sqrt": {"timescale": 20},
    "cosine_with_min_lr": {"min_lr": 0.01},
    "warmup_stable_decay": {"num_decay_steps": 10},
}


@pytest.mark.parametrize("name", NAMED)
def test_schedulers_by_name(name):
    from transformers import optimization  # not at the top: it takes seconds
    from transformers.trainer_utils import SchedulerType

    def rates(get, name):
        opt = new()
        opt.defaults["lr"] = 0.1
        return run(opt, get(name, opt, 7, 50, NAMED[name]), 50)

    expected = rates(optimization.get_scheduler, name)
    np.testing.assert_allclose(rates(family.get_scheduler, name), expected, rtol=1e-12, atol=1e-13)
    opt = new()
    by_member = family.get_scheduler(SchedulerType(name), opt, 7, 50, NAMED[name])
    assert isinstance(by_member, ScheduleLR)


def test_a_plateau_by_name():
    scheduler = onepass.lr_scheduler.get_scheduler(
        "reduce_lr_on_plateau", new(), scheduler_specific_kwargs={"factor": 0.5}
    )
    assert type(scheduler) is onepass.lr_scheduler.ReduceLROnPlateau
    assert scheduler.factor == 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "why"),
    [
        (("linear",), ValueError, "num_warmup_steps: the schedule 'linear' needs it"),
        (("linear", 3), ValueError, "num_training_steps: the schedule 'linear' needs it"),
        (("inverse_sqrt",), ValueError, "num_warmup_steps: the schedule 'inverse_sqrt' needs it"),
        (("greedy",), ValueError, "name: 'greedy' is not known; known are linear, cosine"),
        ((3,), ValueError, "name: 3 is not known"),
        (("cosine", 3, 9, {"num_cycle": 2}), TypeError, "num_cycle"),
    ],
)
def test_schedulers_by_name_that_cannot_be_made(arguments, error, why):
    name, *rest = arguments
    with pytest.raises(error, match=why):
        family.get_scheduler(name, new(), *rest)
