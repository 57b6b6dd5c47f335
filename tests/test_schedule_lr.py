"""ScheduleLR in training: what it sets, how it resumes, plateaus, GradScaler; and the schedules of transformers."""

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
from contract import assert_same, give_gradients, leaves, snapshot, train
from onepass import schedule_lr
from onepass.schedule_lr import ScheduleLR
from onepass.schedules import constant, cosine, exponential, function, linear, step, warmup
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
    with pytest.raises(ValueError, match="lr, weight_decay of 1 parameter groups, this scheduler lr of 1"):
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


@pytest.mark.parametrize("cls", SGDS)
def test_a_first_step_that_is_skipped_warns_of_nothing(cls):
    """torch's schedulers warn that they were stepped before the optimizer, when it was GradScaler that skipped it."""
    opt = new(cls)
    scheduler = ScheduleLR(opt, S, count_skipped=False)
    scheduler.step()
    assert scheduler.last_epoch == 0
    run(opt, scheduler, 2)
    assert scheduler.last_epoch == 2


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
        (lambda: ScheduleLR(3, S), TypeError, "optimizer: int"),
        (
            lambda: ScheduleLR(new(), 3),
            TypeError,
            "schedule: must be a Schedule of .*, or the text of one, got the int 3$",
        ),
        (
            lambda: ScheduleLR(new(), lambda t: 1.0),
            TypeError,
            "got the function <f.*: schedules.function.*LambdaLR takes",
        ),
        (lambda: ScheduleLR(new(), "cosin(3)"), ValueError, "schedule: at position 1, there is no part 'cosin'"),
        (lambda: ScheduleLR(new(groups=3), [S, S]), ValueError, "schedule: there are 2 schedules for 3"),
        (lambda: ScheduleLR(new(), S, weight_decay=[S, S]), ValueError, "weight_decay: there are 2 schedules for 1"),
        (lambda: ScheduleLR(new(), S, betas=(S, S)), ValueError, "betas: parameter group 0 has no such beta"),
        (lambda: ScheduleLR(new(onepass.AdamW), S, betas=(S, S, S)), ValueError, "betas: parameter group 0"),
        (lambda: ScheduleLR(new(onepass.AdamW), S, betas=S), TypeError, "betas: a tuple"),
        (lambda: ScheduleLR(new(onepass.AdamW), S, momentum=S, betas=(S, None)), ValueError, "betas: momentum"),
        (lambda: ScheduleLR(new(onepass.Adagrad), S, momentum=S), ValueError, "momentum: parameter group 0"),
        (lambda: ScheduleLR(new(onepass.Rprop), S, weight_decay=S), ValueError, "weight_decay: parameter group 0"),
        (lambda: ScheduleLR(new(), S, plateau={"patient": 3}), TypeError, "plateau: .*patient"),
        (lambda: ScheduleLR(new(), S, plateau={"factor": 3}), ValueError, "plateau: "),
        (lambda: ScheduleLR(new(), S).step(1.0), ValueError, "metrics: "),
        (lambda: ScheduleLR(new(), S).feed(1.0), ValueError, "metrics: "),
        (lambda: ScheduleLR(new(), S, last_epoch=3), KeyError, "initial_lr"),
        (lambda: ScheduleLR(new(), S, weight_decay=S, last_epoch=3), KeyError, "initial_weight_decay"),
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

    ours, theirs = new(groups=2, lr=0.1), new(groups=2, lr=0.1)
    for opt in (ours, theirs):
        opt.defaults["lr"] = 0.1
    n = options.get("num_training_steps", 150) + 1
    got = run(ours, getattr(schedule_lr, name)(ours, **options), n)
    expected = run(theirs, getattr(optimization, name)(theirs, **options), n)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)
    resumed = getattr(schedule_lr, name)(ours, **options, last_epoch=40)
    torchs = getattr(optimization, name)(theirs, **options, last_epoch=40)
    np.testing.assert_allclose(resumed.get_last_lr(), torchs.get_last_lr(), rtol=1e-12, atol=1e-13)


def test_transformers_signatures():
    import inspect

    from transformers import optimization  # not at the top: it takes seconds

    for name in set(schedule_lr.__all__) - {"ScheduleLR"}:
        ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (schedule_lr, optimization))
        assert {n: p.default for n, p in ours.items()} == {n: p.default for n, p in theirs.items()}, name
        assert list(ours) == list(theirs)


@pytest.mark.parametrize("name", ["get_cosine_schedule_with_warmup", "get_linear_schedule_with_warmup"])
def test_after_the_last_training_step_the_rate_is_held(name):
    opt = new()
    assert run(opt, getattr(schedule_lr, name)(opt, 5, 10), 30)[10:, 0].tolist() == [0.0] * 20


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda o: schedule_lr.get_wsd_schedule(o, 1, 2), "num_training_steps, num_stable_steps"),
        (lambda o: schedule_lr.get_wsd_schedule(o, 1, 2, 9, warmup_type="x"), "warmup_type: 'x'"),
        (lambda o: schedule_lr.get_wsd_schedule(o, 1, 2, 9, decay_type="x"), "decay_type: 'x'"),
        (lambda o: schedule_lr.get_cosine_with_min_lr_schedule_with_warmup(o, 1, 2), "min_lr, min_lr_rate"),
        (lambda o: schedule_lr.get_polynomial_decay_schedule_with_warmup(o, 1, 2, lr_end=1.0), "lr_end"),
        (lambda o: schedule_lr.get_linear_schedule_with_warmup(o, -1, 2), "warmup: steps"),
    ],
)
def test_bad_arguments_of_the_family(make, why):
    with pytest.raises(ValueError, match=why):
        make(torch.optim.SGD(leaves([(3,)]), lr=0.1))


def test_wsd_with_both_counts_warns():
    with pytest.warns(UserWarning, match="num_stable_steps"):
        schedule_lr.get_wsd_schedule(new(), 1, 2, 9, 3)


def test_a_function_of_ones_own_is_known_again_in_the_next_process():
    def schedule():
        def decay(t):
            return 0.9**t

        return ScheduleLR(new(), function(decay))

    schedule().load_state_dict(schedule().state_dict())  # a warning would be an error


def test_the_state_of_another_scheduler_is_refused():
    scheduler = ScheduleLR(new(), S)
    with pytest.raises(ValueError, match="state_dict: it is not that of a ScheduleLR"):
        scheduler.load_state_dict(lr_scheduler.StepLR(new(), 3).state_dict())


def test_no_betas_beside_a_momentum():
    scheduler = ScheduleLR(new(onepass.AdamW), S, momentum=constant(), betas=())
    assert scheduler.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
