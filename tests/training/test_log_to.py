"""log_to: every scalar against the same number computed independently, in float64."""

import contextlib
import copy
import pickle

import onepass
import pytest
import torch
from cases import each_class
from contract import AroundOther, assert_same, give_gradients, leaves, snapshot, train
from onepass.schedules import linear
from reference import params_of
from torch.nn import Parameter

BETAS = ("beta1", "beta2")
EXACT = 1e-6  # relative: norms of float32 numbers, in sums of some 16,384 squares


class Recorder:
    def __init__(self):
        self.written = []

    def add_scalar(self, tag, value, step):
        assert type(value) is float
        assert type(step) is int
        self.written.append((tag, value, step))

    def at(self, step):
        found = {tag: value for tag, value, when in self.written if when == step}
        assert len(found) == sum(when == step for _, _, when in self.written), "a tag twice"
        return found

    @property
    def steps(self):
        return sorted({step for _, _, step in self.written})


def exact(t):
    """The numbers of a tensor, as real ones in float64."""
    t = t.detach().to_dense()
    return (torch.view_as_real(t) if t.is_complex() else t).double().clone()


def norm(tensors):
    return sum(float(exact(t).square().sum()) for t in tensors) ** 0.5


def expect(opt, make_step, scale=1.0):
    """Makes a step; returns all that a log of it must hold but the times."""
    wanted = {}
    for index, group in enumerate(opt.param_groups):
        for name in ("lr", "weight_decay"):
            if name in group:
                wanted[f"optimizer/{name}/{index}"] = float(group[name])
    groups = [[p for p in g["params"] if p.requires_grad or p.grad is not None] for g in opt.param_groups]
    before = [[exact(p) for p in group] for group in groups]
    make_step()
    wanted["optimizer/grad_norm"] = norm(p.grad for p in params_of(opt) if p.grad is not None) / scale
    for index, (group, was) in enumerate(zip(groups, before, strict=True)):
        if norm(was):
            moved = norm(exact(p) - w for p, w in zip(group, was, strict=True))
            wanted[f"optimizer/update_to_weight/{index}"] = moved / norm(was)
    return wanted


def assert_logged(found, wanted, first=True):
    found = dict(found)
    assert found.pop("optimizer/step_seconds") > 0
    assert first != (found.pop("optimizer/iteration_seconds", None) is not None)
    assert found.keys() == wanted.keys()
    assert found == {tag: pytest.approx(value, rel=EXACT, abs=1e-300) for tag, value in wanted.items()}


def logged_step(opt, writer, t):
    """Step t: what was written of it, and what must have been."""
    wanted = expect(opt, opt.step)
    return writer.at(t), wanted


def two_groups(dtype=torch.float32):
    params = leaves(dtype=dtype)
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.25, "weight_decay": 0.5}]


@each_class
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_every_value_of_every_optimizer(row, whose):
    cls = getattr(row, whose)
    opt = cls(leaves(row.shapes, torch.float32), **row.full)
    writer = Recorder()
    with onepass.log_to(writer, opt, interval=3):
        for t in range(8):
            wanted = expect(opt, lambda t=t: train(opt, first=t))
            if t % 3 == 0:
                assert_logged(writer.at(t), wanted, first=t == 0)
    assert writer.steps == [0, 3, 6]


@each_class
def test_logging_does_not_change_a_bit(row):
    logged, plain = (row.ours(leaves(row.shapes, torch.float32), **row.full) for _ in range(2))
    onepass.log_to(Recorder(), logged, interval=2)
    for opt in (logged, plain):
        train(opt, 5)
    assert_same(snapshot(logged), snapshot(plain))
    assert_same(logged.state_dict(), plain.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("make", [onepass.AdamW, torch.optim.AdamW])
def test_dtypes_and_groups(dtype, make):
    opt = make(two_groups(dtype), lr=0.125)
    params = params_of(opt)
    writer = Recorder()
    onepass.log_to(writer, opt, interval=1)
    for t in range(2):
        give_gradients(params, t)
        found, wanted = logged_step(opt, writer, t)
        assert_logged(found, wanted, first=t == 0)


def test_mixed_dtypes_large_small_transposed_and_empty_tensors():
    torch.manual_seed(0)
    shapes = [(70_000,), (3,), (0,), (300, 500), (131_072,), (5, 5)]
    params = [Parameter(torch.randn(shape)) for shape in shapes]
    params.append(Parameter(torch.randn(40, 30).t()))
    params.append(Parameter(torch.randn(9, dtype=torch.float64)))
    params.append(Parameter(torch.randn(9, dtype=torch.complex128)))
    params.append(Parameter(torch.randn(70_001).bfloat16()))
    opt = onepass.AdamW(params, lr=0.01)
    writer = Recorder()
    onepass.log_to(writer, opt, interval=1)
    for t in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        wanted = expect(opt, opt.step)
        assert_logged(writer.at(t), wanted, first=t == 0)


def test_missing_gradients_frozen_parameters_and_parameters_added_later():
    params = leaves(dtype=torch.float32)
    params[1].requires_grad_(False)
    opt = onepass.SGD(params, lr=0.5)
    writer = Recorder()
    onepass.log_to(writer, opt, interval=1)
    give_gradients(params[2:], 0)
    assert_logged(*logged_step(opt, writer, 0))
    added = leaves([(3, 3)], torch.float32, seed=7)
    opt.add_param_group({"params": added, "lr": 0.25})
    give_gradients(added, 1)
    found, wanted = logged_step(opt, writer, 1)
    assert found["optimizer/lr/1"] == 0.25
    assert_logged(found, wanted, first=False)


def test_no_gradients_no_parameters_and_parameters_of_zero():
    opt = onepass.SGD([Parameter(torch.zeros(3))], lr=0.5)
    writer = Recorder()
    onepass.log_to(writer, opt, interval=1)
    opt.step()
    assert writer.at(0)["optimizer/grad_norm"] == 0.0
    assert "optimizer/update_to_weight/0" not in writer.at(0)


@pytest.mark.parametrize("cls", [onepass.SGD, torch.optim.SGD])
def test_uncoalesced_sparse_gradients(cls):
    p = Parameter(torch.ones(5, 3))
    opt = cls([p], lr=0.5)
    writer = Recorder()
    onepass.log_to(writer, opt, interval=1)
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1, 1, 4]]), torch.randn(3, 3), (5, 3), check_invariants=True)
    assert_logged(*logged_step(opt, writer, 0))


@pytest.mark.parametrize("package", [onepass, torch.optim])
@pytest.mark.parametrize(
    ("cls", "options", "make", "driven"),
    [
        ("SGD", {"momentum": 0.9}, lambda o: onepass.ScheduleLR(o, linear(4), momentum=linear(8)), "momentum"),
        ("AdamW", {}, lambda o: onepass.ScheduleLR(o, linear(4), momentum=linear(8)), "betas"),
        ("AdamW", {}, lambda o: onepass.ScheduleLR(o, linear(4), betas=(None, linear(99))), "betas"),
        ("SGD", {"momentum": 0.9}, lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, 9), "momentum"),
        ("AdamW", {}, lambda o: onepass.lr_scheduler.OneCycleLR(o, 1.0, 9), "betas"),
        ("SGD", {"momentum": 0.9}, lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 1.0, 3), "momentum"),
    ],
)
def test_momentum_and_betas_that_a_schedule_drives(package, cls, options, make, driven):
    opt = getattr(package, cls)(two_groups(), lr=0.5, **options)
    scheduler, writer = make(opt), Recorder()
    onepass.log_to(writer, opt, interval=1)
    seen = set()
    for t in range(4):
        values = {}
        for index, group in enumerate(opt.param_groups):
            numbers = (
                {"momentum": group["momentum"]}
                if driven == "momentum"
                else dict(zip(BETAS, group["betas"], strict=True))
            )
            values |= {f"optimizer/{name}/{index}": value for name, value in numbers.items()}
        train(opt, first=t)
        found = writer.at(t)
        assert {tag: found[tag] for tag in values} == values
        seen.add(tuple(values.values()))
        scheduler.step()
    assert len(seen) == 4


@pytest.mark.parametrize(
    "make", [lambda o: onepass.ScheduleLR(o, linear(4)), lambda o: torch.optim.lr_scheduler.StepLR(o, 1)]
)
def test_momentum_and_betas_that_stay_are_not_written(make):
    for opt in (onepass.AdamW(leaves(dtype=torch.float32)), onepass.SGD(leaves(dtype=torch.float32), momentum=0.9)):
        make(opt)
        writer = Recorder()
        onepass.log_to(writer, opt, interval=1)
        wanted = expect(opt, lambda opt=opt: train(opt))
        assert_logged(writer.at(0), wanted)


def test_lookahead_and_a_rate_that_is_a_tensor():
    lr = torch.tensor(0.5)
    opt = onepass.Lookahead(onepass.SGD(leaves(dtype=torch.float32), lr=lr), k=2)
    writer = Recorder()
    onepass.log_to(writer, opt, interval=1)
    for t in range(4):
        give_gradients(params_of(opt), t)
        found, wanted = logged_step(opt, writer, t)
        assert found["optimizer/lr/0"] == 0.5 / 2**t
        assert_logged(found, wanted, first=t == 0)
        lr.mul_(0.5)


@pytest.mark.parametrize("cls", [onepass.AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("unscaled_before", [False, True])
def test_grad_scaler(cls, fused, unscaled_before):
    """The norm is that of the unscaled gradients; a step that is skipped is not written."""
    opt = cls(leaves(dtype=torch.float32), lr=0.1, fused=fused)
    writer = Recorder()
    log = onepass.log_to(writer, opt, interval=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    give_gradients(params_of(opt), 0)
    expected = norm(p.grad for p in params_of(opt))
    for p in params_of(opt):
        p.grad *= 1024.0
    if unscaled_before:
        scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    assert writer.at(0)["optimizer/grad_norm"] == pytest.approx(expected, rel=EXACT)
    count = len(writer.written)
    params_of(opt)[1].grad[0] = float("inf")
    scaler.step(opt)
    scaler.update()
    assert len(writer.written) == count
    assert log.step == (2 if fused else 1)  # whether the step was called


def test_a_closure_that_makes_the_gradients():
    p = Parameter(torch.tensor([1.0, 2.0]))
    opt = onepass.SGD([p], lr=0.25)
    writer = Recorder()
    onepass.log_to(writer, opt, interval=1)

    def closure():
        p.grad = torch.tensor([3.0, 4.0])
        return 7.0

    assert opt.step(closure) == 7.0
    assert opt.step(closure=closure) == 7.0
    assert writer.at(0)["optimizer/grad_norm"] == writer.at(1)["optimizer/grad_norm"] == 5.0
    assert writer.at(0)["optimizer/update_to_weight/0"] == pytest.approx(1.25 / 5**0.5, rel=EXACT)


def test_the_step_that_raises_is_not_counted():
    p = Parameter(torch.tensor([1.0, 2.0]))
    opt = onepass.SGD([p], lr=0.25)
    writer = Recorder()
    log = onepass.log_to(writer, opt, interval=2)

    def fail():
        raise ArithmeticError("no")

    for _ in range(2):
        with pytest.raises(ArithmeticError):
            opt.step(fail)
    assert (log.step, writer.written) == (0, [])
    p.grad = torch.ones(2)
    opt.step()
    assert (log.step, writer.steps) == (1, [0])


def test_a_step_that_cannot_be_written_is_counted():
    class Full(Recorder):
        def add_scalar(self, tag, value, step):
            if step == 2:
                raise OSError("no space left")
            super().add_scalar(tag, value, step)

    p = Parameter(torch.tensor([1.0, 2.0]))
    p.grad = torch.ones(2)
    opt, writer = onepass.Adam([p]), Full()
    log = onepass.log_to(writer, opt, interval=1)
    for step in range(4):
        with contextlib.suppress(OSError):
            opt.step()
        assert log.step == opt.state[p]["step"] == step + 1
    assert set(writer.steps) == {0, 1, 3}


def test_several_logs_numbers_and_prefixes():
    opt = onepass.SGD(leaves(), lr=0.25)
    one, two = Recorder(), Recorder()
    onepass.log_to(one, opt, interval=4, first_step=6)
    onepass.log_to(two, opt, interval=3, prefix="mine/too")
    train(opt, 7)
    assert one.steps == [8, 12]
    assert two.steps == [0, 3, 6]
    assert {tag.rsplit("/", 2)[0] for tag, *_ in two.written if "lr" in tag} == {"mine/too"}


def test_times(monkeypatch):
    """With a clock that ticks once whenever it is read."""
    ticks = iter(range(1000))
    monkeypatch.setattr("onepass.training.step_log.time.perf_counter", lambda: float(next(ticks)))
    opt = onepass.SGD(leaves(), lr=0.25)
    writer = Recorder()
    onepass.log_to(writer, opt, interval=2)
    train(opt, 3)
    # The first logged step reads 0, 1 (before), 2 (after), 3 (done); the second 4, 5, 6.
    assert [writer.at(t)["optimizer/step_seconds"] for t in (0, 2)] == [1.0, 1.0]
    assert writer.at(2)["optimizer/iteration_seconds"] == ((4 - 3) + (6 - 5)) / 2


@pytest.mark.parametrize("wrap", [False, True])
def test_nothing_is_left_behind_and_nothing_is_copied(wrap):
    opt = onepass.AdamW(leaves(), lr=0.25)
    opt = onepass.Lookahead(opt) if wrap else opt
    opt.register_step_post_hook(print_nothing)
    before = [list(getattr(opt, f"_optimizer_step_{when}_hooks")) for when in ("pre", "post")]
    attributes = set(opt.__dict__)
    writer = Recorder()
    with onepass.log_to(writer, opt, interval=1) as log:
        give_gradients(params_of(opt), 0)
        opt.step()
        for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
            assert not twin._optimizer_step_pre_hooks
            assert_same(snapshot(twin), snapshot(opt))
            for p in params_of(twin):
                p.grad = torch.ones_like(p)
            twin.step()
        assert writer.steps == [0]
    opt.step()
    log.remove()  # once more
    assert writer.steps == [0]
    assert set(opt.__dict__) - attributes <= {"_cached_plan"}
    assert [list(getattr(opt, f"_optimizer_step_{when}_hooks")) for when in ("pre", "post")] == before


def print_nothing(*_):
    pass


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"interval": 0}, ValueError, "interval must be >= 1, got 0"),
        ({"interval": 2.5}, TypeError, "interval must be an integer >= 1, got the float 2.5"),
        ({"interval": True}, TypeError, "interval must be an integer >= 1, got the bool True"),
        ({"first_step": -1}, ValueError, "first_step must be >= 0, got -1"),
        ({"writer": object()}, TypeError, "add_scalar.*got the object"),
        ({"optimizer": 3}, TypeError, "log_to: optimizer must be a torch.optim.Optimizer, got the int 3"),
    ],
)
def test_bad_arguments(arguments, error, message):
    opt = onepass.SGD(leaves(), lr=0.25)
    with pytest.raises(error, match=message):
        onepass.log_to(**{"writer": Recorder(), "optimizer": opt, **arguments})
    assert not opt._optimizer_step_pre_hooks
    assert not opt._optimizer_step_post_hooks


# -- optimizers that measure, clip and skip ----------------------------------------------------------------------------


def expect_reported(opt, make_step, norm_of=norm):
    """Makes a step by an optimizer that measures; returns all that a log of it must hold but the times."""
    grads = [p.grad.clone() for p in params_of(opt) if p.grad is not None]
    wanted = expect(opt, make_step)
    report = opt.last_step
    wanted["optimizer/grad_norm"] = norm_of(grads)
    wanted["optimizer/clip_coefficient"] = report.coefficient
    wanted["optimizer/skipped"] = 0.0
    return wanted


@pytest.fixture
def no_pass_over_gradients(monkeypatch):
    """Fails a log that measures the gradients although the optimizer has."""

    def fail(optimizer):
        raise AssertionError("a pass over the gradients")

    monkeypatch.setattr("onepass.training.step_log._grad_norm", fail)


@pytest.mark.usefixtures("no_pass_over_gradients")
@pytest.mark.parametrize("wrap", [lambda opt: opt, onepass.Lookahead, lambda opt: onepass.Lookahead(AroundOther(opt))])
@pytest.mark.parametrize(
    "arguments",
    [{"max_norm": 0.5}, {"skip_nonfinite": True}, {"max_norm": 0.5, "zero_grad": True, "clip_value": 0.1}],
    ids=lambda arguments: "-".join(arguments),
)
def test_an_optimizer_that_measures(wrap, arguments):
    opt = wrap(onepass.AdamW(two_groups(torch.float32), lr=0.1, **arguments))
    writer = Recorder()
    onepass.log_to(writer, opt, interval=2)
    for t in range(4):
        give_gradients(params_of(opt), t)
        wanted = expect_reported(opt, opt.step)
        if t % 2 == 0:
            assert_logged(writer.at(t), wanted, first=t == 0)
            assert (wanted["optimizer/clip_coefficient"] < 1.0) == ("max_norm" in arguments)
    assert writer.steps == [0, 2]


@pytest.mark.usefixtures("no_pass_over_gradients")
def test_the_largest_magnitude():
    opt = onepass.SGD(leaves(dtype=torch.float32), lr=0.1, max_norm=0.5, norm_type=float("inf"))
    writer = Recorder()
    onepass.log_to(writer, opt, interval=1)
    give_gradients(params_of(opt), 0)
    wanted = expect_reported(opt, opt.step, lambda grads: max(float(g.abs().max()) for g in grads if g.numel()))
    assert_logged(writer.at(0), wanted)


@pytest.mark.usefixtures("no_pass_over_gradients")
@pytest.mark.parametrize("reason", ["policy", "nan"])
def test_a_step_that_the_optimizer_skips(reason):
    """Nothing but the norm, the coefficient and that it was skipped; the steps after it are logged as ever."""
    policy = onepass.SkipSpikes(window=4)
    opt = onepass.AdamW(leaves(dtype=torch.float32), lr=0.1, max_norm=policy, skip_nonfinite=True)
    writer = Recorder()
    log = onepass.log_to(writer, opt, interval=1)
    for t in range(6):
        give_gradients(params_of(opt), t)
        if t != 4:
            wanted = expect_reported(opt, opt.step)
            assert_logged(writer.at(t), wanted, first=t == 0)
            continue
        for p in params_of(opt):
            p.grad.mul_(1e6)
        if reason == "nan":
            params_of(opt)[0].grad.view(-1)[0] = float("nan")
        opt.step()
        assert opt.last_step.skipped
        assert writer.at(t) == {
            "optimizer/grad_norm": pytest.approx(norm(p.grad for p in params_of(opt)), rel=EXACT, nan_ok=True),
            "optimizer/clip_coefficient": 0.0 if reason == "policy" else 1.0,
            "optimizer/skipped": 1.0,
        }
    assert log.step == 6


@pytest.mark.usefixtures("no_pass_over_gradients")
@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("unscaled_before", [False, True])
def test_a_norm_that_the_optimizer_measures_under_gradscaler(unscaled_before, zero_grad):
    opt = onepass.AdamW(leaves(dtype=torch.float32), lr=0.1, max_norm=0.5, zero_grad=zero_grad)
    writer = Recorder()
    log = onepass.log_to(writer, opt, interval=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    for t in range(2):
        give_gradients(params_of(opt), t)
        expected = norm(p.grad for p in params_of(opt))
        for p in params_of(opt):
            p.grad *= 1024.0
        if t == 1:
            params_of(opt)[1].grad[0] = float("inf")
        if unscaled_before:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        if t == 0:
            assert writer.at(0)["optimizer/grad_norm"] == pytest.approx(expected, rel=EXACT)
            assert writer.at(0)["optimizer/clip_coefficient"] == pytest.approx(0.5 / (expected + 1e-6), rel=EXACT)
            assert writer.at(0)["optimizer/skipped"] == 0.0
    assert writer.at(1) == {"optimizer/clip_coefficient": 1.0, "optimizer/skipped": 1.0}
    assert log.step == 2


@pytest.mark.parametrize("arguments", [{}, {"max_norm": float("inf")}], ids=["", "measured"])
@pytest.mark.parametrize("has_closure", [False, True])
def test_gradients_that_the_step_zeroes(arguments, has_closure):
    """The norm is that of the gradients before they were zeroed, or it is not written."""
    p = Parameter(torch.tensor([1.0, 2.0]))
    opt = onepass.SGD([p], lr=0.25, zero_grad=True, **arguments)
    writer = Recorder()
    onepass.log_to(writer, opt, interval=1)

    def closure():
        p.grad = torch.tensor([3.0, 4.0])
        return 7.0

    if has_closure:
        assert opt.step(closure) == 7.0
    else:
        closure()
        opt.step()
    assert not p.grad.any()
    is_known = not has_closure or "max_norm" in arguments
    assert writer.at(0).get("optimizer/grad_norm") == (5.0 if is_known else None)
    assert writer.at(0)["optimizer/update_to_weight/0"] == pytest.approx(1.25 / 5**0.5, rel=EXACT)
    assert ("optimizer/skipped" in writer.at(0)) == ("max_norm" in arguments)


@pytest.mark.parametrize("wrap", [lambda opt: opt, onepass.Lookahead, lambda opt: onepass.Combined([opt])])
@pytest.mark.parametrize("has_closure", [False, True])
def test_gradients_that_a_part_of_combined_zeroes(wrap, has_closure):
    kept, zeroed = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    opt = wrap(onepass.Combined([onepass.SGD([kept], lr=0.1), onepass.SGD([zeroed], lr=0.1, zero_grad=True)]))
    kept.grad, zeroed.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0, 0.0])
    writer = Recorder()
    onepass.log_to(writer, opt, interval=1)
    opt.step((lambda: 7.0) if has_closure else None)
    assert not zeroed.grad.any()
    assert writer.at(0).get("optimizer/grad_norm") == (None if has_closure else 5.0)


@pytest.mark.parametrize("arguments", [{"clip_value": 0.1}, {"zero_grad": True}], ids=lambda each: next(iter(each)))
def test_an_optimizer_that_does_not_measure_is_logged_as_any_other(arguments):
    opt = onepass.AdamW(two_groups(torch.float32), lr=0.1, **arguments)
    writer = Recorder()
    onepass.log_to(writer, opt, interval=1)
    give_gradients(params_of(opt), 0)
    measured = norm(p.grad for p in params_of(opt))
    wanted = {**expect(opt, opt.step), "optimizer/grad_norm": measured}
    assert_logged(writer.at(0), wanted)


def test_the_event_file(tmp_path):
    """TensorBoard itself reads what was written; it keeps float32."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    opt = onepass.AdamW(two_groups(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    recorder = Recorder()
    wanted = {}
    with SummaryWriter(tmp_path) as writer, onepass.log_to(writer, opt, interval=2), onepass.log_to(recorder, opt):
        for t in range(5):
            give_gradients(params_of(opt), t)
            wanted[t] = expect(opt, opt.step)
            schedule.step()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert found.keys() == {*wanted[0], "optimizer/step_seconds", "optimizer/iteration_seconds"}
    for tag in wanted[0]:
        assert found[tag] == {t: pytest.approx(wanted[t][tag], rel=EXACT) for t in (0, 2, 4)}
    assert found["optimizer/lr/1"] == {0: 0.25, 2: 0.0625, 4: 0.015625}
    assert list(found["optimizer/step_seconds"]) == [0, 2, 4]
    assert list(found["optimizer/iteration_seconds"]) == [2, 4]
