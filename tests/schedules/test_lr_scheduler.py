"""Schedulers against torch's: the same rates, states, errors; and what users report of torch's, which is right here."""

import copy
import inspect
import itertools
import math
import pickle
import subprocess
import sys
import warnings

import onepass
import pytest
import torch
from onepass.schedules.previewed import Previewed
from schedulers import ALL, ARGUMENTS, CHAININGS, OURS, SINGLE, TORCH, advance, numbers, optimizer, run
from torch.optim.lr_scheduler import LRScheduler

NAMES = [*ARGUMENTS, "SequentialLR", "ChainedScheduler"]


def test_every_name():
    assert set(torch.optim.lr_scheduler.__all__) <= set(OURS.__all__)
    assert set(NAMES) == set(OURS.__all__) - {"LRScheduler"}
    for name in [*OURS.__all__, "_LRScheduler"]:
        ours, theirs = getattr(OURS, name), getattr(TORCH, name)
        assert ours is not theirs
        assert issubclass(ours, theirs)
        assert issubclass(ours, OURS.LRScheduler)
        assert issubclass(ours, Previewed)
        assert (ours.__name__, ours.__module__) == (name, "onepass.lr_scheduler")
        assert ours.__doc__ or name == "_LRScheduler"
    assert onepass.swa_utils.SWALR is OURS.SWALR
    assert OURS.EPOCH_DEPRECATION_WARNING == TORCH.EPOCH_DEPRECATION_WARNING


@pytest.mark.parametrize("name", NAMES)
def test_arguments(name):
    def parameters(cls):
        return [(p.name, p.kind, p.default) for p in inspect.signature(cls).parameters.values()]

    assert parameters(getattr(OURS, name)) == parameters(getattr(TORCH, name))


@pytest.mark.slow
def test_names_of_other_versions_of_torch():
    """What torch has more is there, and can be previewed; what it lacks is not missed."""
    code = """
import torch
from torch.optim import lr_scheduler as theirs
theirs.NewLR = type("NewLR", (theirs.StepLR,), {"__doc__": "Newer."})
theirs.new = lambda: 3
theirs.__all__ = [name for name in theirs.__all__ if name != "CyclicLR"] + ["NewLR", "new"]
del theirs.CyclicLR, theirs.EPOCH_DEPRECATION_WARNING
import onepass
ours = onepass.lr_scheduler
assert ours.new is theirs.new and not hasattr(ours, "CyclicLR") and "CyclicLR" not in ours.__all__
opt = onepass.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
assert ours.NewLR(opt, 2, 0.5).preview(5).tolist() == [[1.0], [1.0], [0.5], [0.5], [0.25]]
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("case", ALL)
def test_thousand_steps(case, tensor_lr):
    ours = ALL[case](OURS, optimizer(onepass, tensor_lr))
    theirs = ALL[case](TORCH, optimizer(torch.optim, tensor_lr))
    assert isinstance(ours, type(theirs))
    for t in range(1000):
        assert numbers(ours.optimizer) == numbers(theirs.optimizer), t
        assert ours.get_last_lr() == theirs.get_last_lr(), t
        assert getattr(ours, "last_epoch", None) == getattr(theirs, "last_epoch", None), t
        if t < 999:
            advance(ours, t)
            advance(theirs, t)
    for group in ours.optimizer.param_groups:
        assert isinstance(group["lr"], torch.Tensor) == tensor_lr
    assert getattr(ours, "base_lrs", None) == getattr(theirs, "base_lrs", None)
    assert set(ours.state_dict()) == set(theirs.state_dict())


@pytest.mark.parametrize("ours_too", [False, True], ids=["torch's optimizer", "our scheduler for both"])
def test_stepped_one_after_the_other(ours_too):
    """The chainings of torch's documentation that take no scheduler for them."""

    def rates(m, package):
        opt = optimizer(package)
        schedulers = [m.ExponentialLR(opt, 0.9), m.MultiStepLR(opt, [30, 80], 0.1)]
        first, swa = m.CosineAnnealingLR(opt, 100), m.SWALR(opt, swa_lr=0.05, anneal_epochs=20)
        rows = []
        for t in range(300):
            rows.append(numbers(opt))
            opt.step()
            if t < 100:
                for scheduler in schedulers:
                    scheduler.step()
            elif t < 160:
                first.step()
            else:
                swa.step()
        return rows

    assert rates(OURS, onepass if ours_too else torch.optim) == rates(TORCH, torch.optim)


@pytest.mark.parametrize(("source", "target"), [(OURS, OURS), (TORCH, OURS), (OURS, TORCH)], ids=["own", "from", "to"])
@pytest.mark.parametrize("case", ALL)
def test_resumed_at_every_step(case, source, target):
    """A run that is saved and loaded into new objects goes on as if it had not been stopped; torch's as ours."""
    steps, ahead = 45, 12
    expected = run(ALL[case](source, optimizer()), steps + ahead)
    running = ALL[case](source, optimizer())
    for t in range(steps):
        states = copy.deepcopy((running.optimizer.state_dict(), running.state_dict()))
        resumed = ALL[case](target, optimizer())
        resumed.optimizer.load_state_dict(states[0])
        resumed.load_state_dict(states[1])
        assert resumed.get_last_lr() == running.get_last_lr(), t
        assert run(resumed, ahead, t) == expected[t : t + ahead], t
        advance(running, t)


def own(base):
    class InverseRoot(base):
        def __init__(self, opt, warmup, last_epoch=-1):
            self.warmup = warmup
            super().__init__(opt, last_epoch)

        def get_lr(self):
            return [lr / math.sqrt(max(self.last_epoch, self.warmup)) for lr in self.base_lrs]

    return InverseRoot


def test_own_subclass():
    ours, theirs = own(OURS.LRScheduler)(optimizer(), 5), own(LRScheduler)(optimizer(torch.optim), 5)
    expected = run(theirs, 50)
    assert [[lr for lr, _ in row] for row in expected] == ours.preview(50).tolist()
    assert run(ours, 50) == expected
    assert ours.state_dict() == theirs.state_dict()
    ours.optimizer.param_groups[0].pop("initial_lr")
    with pytest.raises(KeyError, match=r"initial_lr.*param_groups\[0\]"):
        own(OURS.LRScheduler)(ours.optimizer, 5, last_epoch=3)


WRONG = {
    "no optimizer": lambda m, opt: m.StepLR(None, 3),
    "no optimizer for a cosine": lambda m, opt: m.CosineAnnealingLR(None, 3),
    "lambdas for other groups": lambda m, opt: m.LambdaLR(opt, [lambda t: 1.0]),
    "constant factor": lambda m, opt: m.ConstantLR(opt, 2.0),
    "linear factor": lambda m, opt: m.LinearLR(opt, 0.0),
    "plateau's factor": lambda m, opt: m.ReduceLROnPlateau(opt, factor=1.0),
    "plateau's mode": lambda m, opt: m.ReduceLROnPlateau(opt, "least"),
    "no steps": lambda m, opt: m.OneCycleLR(opt, 0.1),
    "share": lambda m, opt: m.OneCycleLR(opt, 0.1, 10, pct_start=2.0),
    "restart": lambda m, opt: m.CosineAnnealingWarmRestarts(opt, 0),
    "cyclic mode": lambda m, opt: m.CyclicLR(opt, 0.1, 0.2, mode="square"),
    "annealing": lambda m, opt: m.SWALR(opt, 0.1, anneal_strategy="none"),
    "no parts": lambda m, opt: m.SequentialLR(opt, [], []),
    "milestones": lambda m, opt: m.SequentialLR(opt, [m.StepLR(opt, 3)], [1]),
    "part": lambda m, opt: m.SequentialLR(opt, [3], []),
    "part elsewhere": lambda m, opt: m.SequentialLR(opt, [m.StepLR(optimizer(), 3)], []),
    "no links": lambda m, opt: m.ChainedScheduler([], opt),
    "link": lambda m, opt: m.ChainedScheduler([3], opt),
    "link elsewhere": lambda m, opt: m.ChainedScheduler([m.StepLR(optimizer(), 3)], opt),
    "cosine not started": lambda m, opt: m.CosineAnnealingLR(opt, 3, last_epoch=2),
    "one cycle not started": lambda m, opt: m.OneCycleLR(opt, 0.1, 10, last_epoch=2),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    opt = optimizer()
    with pytest.raises((ValueError, TypeError, KeyError)) as theirs:
        WRONG[case](TORCH, opt)
    with pytest.raises(theirs.type) as ours:
        WRONG[case](OURS, opt)
    assert str(ours.value) == str(theirs.value)


def test_warnings():
    for m in (OURS, TORCH):
        scheduler = m.StepLR(optimizer(), 3)
        with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
            scheduler.step()
        with pytest.warns(UserWarning, match="please use `get_last_lr"):
            scheduler.get_lr()
        with pytest.warns(UserWarning, match="epoch parameter"):
            scheduler.step(7)
        assert scheduler.get_last_lr() == [0.1 * 0.1**2, 0.02 * 0.1**2]


# What users report of torch's schedulers, with the number of torch's issue. The first part of each test shows it of
# torch; where that fails, torch has mended it.


def constant_and_exponential(m, last_epoch=-1, opt=None):
    opt = opt or onepass.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    parts = [m.ConstantLR(opt, 0.1, 20), m.ExponentialLR(opt, 0.9)]
    return m.SequentialLR(opt, parts, milestones=[3], last_epoch=last_epoch)


def test_sequence_resumed_by_last_epoch():
    """162591: after four steps the rate was 0.9; a sequence that is made with last_epoch=4 begins at 0.1."""
    assert constant_and_exponential(TORCH, 4).get_last_lr() == [0.1]
    assert constant_and_exponential(OURS, 4).get_last_lr() == [0.9]


# Not on a loaded optimizer with OneCycleLR: that writes initial_lr, from which the parts before it would begin.
@pytest.mark.parametrize(
    ("case", "loaded"),
    [*itertools.product(["sequence", "warm-up and cosine"], [False, True]), ("sequence of four", False)],
)
def test_sequence_resumed_by_last_epoch_at_every_step(case, loaded, monkeypatch):
    running = CHAININGS[case](OURS, optimizer())
    expected = run(CHAININGS[case](OURS, optimizer()), 110)
    original = OURS.SequentialLR
    for t in range(90):
        opt = optimizer()
        if loaded:
            opt.load_state_dict(copy.deepcopy(running.optimizer.state_dict()))
        monkeypatch.setattr(OURS, "SequentialLR", lambda *args, t=t: original(*args, last_epoch=t))
        resumed = CHAININGS[case](OURS, opt)
        monkeypatch.setattr(OURS, "SequentialLR", original)
        assert resumed.last_epoch == running.last_epoch == t
        assert run(resumed, 20, t) == expected[t : t + 20], t
        advance(running, t)


def test_resuming_a_sequence_neither_warns_nor_hides_warnings():
    scheduler = constant_and_exponential(OURS, 2)  # warnings are errors here
    assert not scheduler.optimizer._opt_called
    scheduler = constant_and_exponential(OURS)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


ENDING = {
    "CosineAnnealingLR": {"T_max": 10},
    "CosineAnnealingLR with eta_min": {"T_max": 10, "eta_min": 0.01},
    "LinearLR": {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 10},
    "LinearLR to zero but for rounding": {"end_factor": 0.0, "total_iters": 10},
    "PolynomialLR": {"total_iters": 10},
}


@pytest.mark.parametrize("loaded", [False, True], ids=["same optimizer", "loaded optimizer"])
@pytest.mark.parametrize("case", ENDING)
def test_second_scheduler_on_an_optimizer_whose_rate_is_at_its_end(case, loaded):
    """78003: it stays at zero (the cosine at eta_min) for good."""

    def again(m, opt):
        return getattr(m, case.split()[0])(opt, **ENDING[case])

    def second(m):
        scheduler = again(m, optimizer())
        expected = run(scheduler, 10)
        opt = scheduler.optimizer
        if loaded:
            opt = optimizer()
            opt.load_state_dict(copy.deepcopy(scheduler.optimizer.state_dict()))
        return expected, run(again(m, opt), 10)

    end = ENDING[case].get("eta_min", 0.0)
    for row in second(TORCH)[1]:
        assert [lr for lr, _ in row] == pytest.approx([end, end], rel=0, abs=1e-15)
    expected, rows = second(OURS)
    assert rows == expected
    assert rows[0][0][0] == 0.1 * ENDING[case].get("start_factor", 1 / 3 if "Linear" in case else 1.0)


def test_cosine_with_last_epoch_at_its_end():
    """It sticks at zero with last_epoch=T_max, too. The optimizer's rate is kept otherwise, as torch does."""

    def resumed(m, last_epoch, lr):
        opt = optimizer()
        for group in opt.param_groups:
            group["initial_lr"] = group["lr"]
            group["lr"] *= lr
        return [row[0][0] for row in run(m.CosineAnnealingLR(opt, 10, last_epoch=last_epoch), 10)]

    assert resumed(TORCH, 10, 0.0) == [0.0] * 10
    expected = [0.05 * (1 + math.cos(math.pi * t / 10)) for t in range(11, 21)]
    assert resumed(OURS, 10, 0.0) == pytest.approx(expected, rel=1e-12, abs=0)
    assert resumed(OURS, 9, 0.0)[0] == 0.0  # right there: the next step is the tenth, the lowest of all
    assert resumed(OURS, 4, 0.5) == resumed(TORCH, 4, 0.5)


def test_a_cosine_keeps_what_a_chain_in_the_making_has_set():
    def chain(m):
        opt = optimizer()
        return m.ChainedScheduler([m.LambdaLR(opt, lambda t: min(t / 5, 1.0)), m.CosineAnnealingLR(opt, 30)])

    assert numbers(chain(OURS).optimizer)[0][0] == 0.0
    assert run(chain(OURS), 50) == run(chain(TORCH), 50)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_second_cosine_with_tensor_rates(tensor_lr):
    opt = optimizer(tensor_lr=tensor_lr)
    held = [group["lr"] for group in opt.param_groups]
    expected = run(OURS.CosineAnnealingLR(opt, 10), 10)
    assert run(OURS.CosineAnnealingLR(opt, 10), 10) == expected
    assert all(group["lr"] is lr for group, lr in zip(opt.param_groups, held, strict=True)) == tensor_lr


@pytest.mark.parametrize("case", [name for name in SINGLE if name.startswith(("OneCycle", "Cyclic"))])
def test_last_epoch_counts_batches(case, monkeypatch):
    """69753: named for epochs, it is the index of the last batch done, whichever that is."""
    name = case.split("-")[0]
    running = ALL[case](OURS, optimizer())
    expected = run(ALL[case](OURS, optimizer()), 50)
    original = getattr(OURS, name)
    for t in range(1, 40):
        advance(running, t - 1)
        opt = optimizer()
        opt.load_state_dict(copy.deepcopy(running.optimizer.state_dict()))
        monkeypatch.setattr(OURS, name, lambda *args, t=t, **options: original(*args, **options, last_epoch=t - 1))
        resumed = ALL[case](OURS, opt)
        monkeypatch.setattr(OURS, name, original)
        assert resumed.last_epoch == t
        assert run(resumed, 10, t) == expected[t : t + 10], t


def plateau(m, opt, **options):
    return m.ReduceLROnPlateau(opt, factor=0.5, patience=1, eps=0.0, **options)


BAD = [1.0] * 100  # a metric that never improves: the plateau halves at the third step and at every second from there


@pytest.mark.parametrize("m", [OURS, TORCH], ids=["ours", "torch's"])
def test_plateau_in_a_sequence(m):
    """68978: torch's refuses it."""
    opt = optimizer()
    with pytest.raises(ValueError, match="does not support `ReduceLROnPlateau`"):
        TORCH.SequentialLR(opt, [TORCH.LinearLR(opt, 0.25, total_iters=3), plateau(TORCH, opt)], [3])
    opt = optimizer()
    parts = [m.LinearLR(opt, 0.25, total_iters=3), plateau(m, opt), m.StepLR(opt, 2)]
    scheduler = OURS.SequentialLR(opt, parts, [3, 10])
    lrs = []
    for value in BAD[:14]:
        lrs.append(opt.param_groups[0]["lr"])
        assert scheduler.get_last_lr() == [group["lr"] for group in opt.param_groups]
        opt.step()
        scheduler.step(value)
    # From step 3 on it is the plateau's turn; it sees its first metric in the step to 4.
    expected = [0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.1, 0.1, 0.01, 0.01]
    assert lrs == pytest.approx(expected, rel=1e-12, abs=0)


def test_plateau_in_a_sequence_without_metrics():
    opt = optimizer()
    scheduler = OURS.SequentialLR(opt, [plateau(OURS, opt), OURS.ExponentialLR(opt, 0.5)], [40])
    for _ in range(9):
        opt.step()
        scheduler.step()  # batches
    for _ in range(3):
        opt.step()
        scheduler.step(metrics=1.0)  # epochs
    assert (scheduler.last_epoch, scheduler.get_last_lr()) == (12, [0.05, 0.01])
    scheduler.step()  # the metric is not used a second time
    assert scheduler.get_last_lr() == [0.05, 0.01]


LINKS = {
    "recursive": lambda m, opt: m.ExponentialLR(opt, 0.9),
    "anew": lambda m, opt: m.LambdaLR(opt, lambda t: 0.9**t),
    "cosine": lambda m, opt: m.CosineAnnealingLR(opt, 40, 1e-3),
    "one cycle": lambda m, opt: m.OneCycleLR(opt, 0.1, 100),
    "sequence": lambda m, opt: m.SequentialLR(opt, [m.LinearLR(opt, 0.1), m.StepLR(opt, 7)], [5]),
}


@pytest.mark.parametrize("m", [OURS, TORCH], ids=["ours", "torch's"])
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("case", LINKS)
def test_plateau_in_a_chain(case, first, m):
    """110761: torch's refuses it; by hand, what computes the rate anew undoes its work. Here the two multiply."""
    opt = optimizer()
    with pytest.raises(ValueError, match="does not support `ReduceLROnPlateau`"):
        TORCH.ChainedScheduler([LINKS[case](TORCH, opt), plateau(TORCH, opt)])
    alone = run(LINKS[case](m, optimizer()), 40)
    opt = optimizer()
    links = [LINKS[case](m, opt), plateau(m, opt)]
    scheduler = OURS.ChainedScheduler(links[::-1] if first else links)
    for t in range(40):
        factor = 0.5 ** (max(t - 1, 0) // 2)
        assert [lr for lr, _ in numbers(opt)] == pytest.approx([factor * lr for lr, _ in alone[t]], rel=1e-12, abs=0), t
        assert scheduler.get_last_lr() == [group["lr"] for group in opt.param_groups]
        opt.step()
        scheduler.step(1.0)


def test_chain_of_plateaus():
    opt = optimizer()
    scheduler = OURS.ChainedScheduler([plateau(OURS, opt), plateau(TORCH, opt, min_lr=0.03)])
    for _ in range(3):
        opt.step()
        scheduler.step(1.0)
    assert scheduler.get_last_lr() == pytest.approx([0.03, 0.01], rel=1e-12, abs=0)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_sequence_of_plateaus(tensor_lr):
    opt = optimizer(tensor_lr=tensor_lr)
    scheduler = OURS.SequentialLR(opt, [plateau(OURS, opt), plateau(TORCH, opt)], [4])
    lrs = []
    for _ in range(8):
        lrs.append(float(opt.param_groups[0]["lr"]))
        opt.step()
        scheduler.step(1.0)
    assert lrs == [0.1, 0.1, 0.1, 0.05, 0.1, 0.1, 0.1, 0.05]


def test_a_metric_is_forgotten_when_a_step_fails():
    opt = optimizer()
    cycle, held = OURS.OneCycleLR(opt, 0.1, 2), plateau(OURS, opt)
    scheduler = OURS.ChainedScheduler([cycle, held])
    with pytest.raises(ValueError, match="total steps is 2"):  # noqa: PT012
        for _ in range(3):
            opt.step()
            scheduler.step(1.0)
    cycle.total_steps = 100
    scheduler.step()
    assert held.last_epoch == 2


def test_a_saved_state_stays_as_it_is():
    opt = optimizer()
    scheduler = OURS.ChainedScheduler([OURS.ExponentialLR(opt, 0.9), plateau(OURS, opt)])
    state = scheduler.state_dict()
    for _ in range(5):
        opt.step()
        scheduler.step(1.0)
    assert state["_reductions"] == [1.0, 1.0]
    assert scheduler.state_dict()["_reductions"] == pytest.approx([0.25, 0.25], rel=1e-12, abs=0)


def composed(m, opt):
    """A plateau within a chain within a sequence within a chain."""
    inner = m.ChainedScheduler([m.LambdaLR(opt, lambda t: 1 / (1 + t)), plateau(m, opt)])
    warm = m.SequentialLR(opt, [m.LinearLR(opt, 0.25, total_iters=2), inner], [3])
    return m.ChainedScheduler([warm, m.ExponentialLR(opt, 0.99)])


def test_nested():
    opt = optimizer()
    scheduler = composed(OURS, opt)
    for t in range(30):
        lr = [0.25, 0.625, 1.0][t] if t < 3 else 0.5 ** (max(t - 4, 0) // 2) / (t - 2)
        # The chain's recursive link begins anew with the inner chain, whose rates are computed.
        assert opt.param_groups[0]["lr"] == pytest.approx(0.1 * lr * (0.99**t if t < 3 else 0.99), rel=1e-12, abs=0), t
        opt.step()
        scheduler.step(1.0)


@pytest.mark.parametrize("inner", ["SequentialLR", "ChainedScheduler"])
@pytest.mark.parametrize("first", [True, False])
def test_compositions_of_torch_as_parts(inner, first):
    """Also where they have parts of their own that are compositions."""

    def make(m, opt):
        parts = [
            m.LinearLR(opt, 0.25, total_iters=3),
            m.ChainedScheduler([m.StepLR(opt, 2), m.ExponentialLR(opt, 0.9)]),
        ]
        part = m.SequentialLR(opt, parts, [2]) if inner == "SequentialLR" else m.ChainedScheduler(parts)
        both = [part, m.ExponentialLR(opt, 0.5)]
        return part, OURS.SequentialLR(opt, both if first else both[::-1], [4])

    _, ours = make(OURS, optimizer())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's chain has stepped its links already
        part, theirs = make(TORCH, optimizer())
    expected = run(ours, 12)
    assert run(theirs, 5) == expected[:5]
    copied = pickle.loads(pickle.dumps(theirs))
    assert run(theirs, 7, 5) == expected[5:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a copied optimizer has not been stepped
        assert run(copied, 7, 5) == expected[5:]
    assert part.get_last_lr() == theirs._schedulers[0 if first else 1].get_last_lr()
    assert type(part) is getattr(TORCH, inner)


def nested_first(m, opt):
    return m.SequentialLR(opt, [CHAININGS["chain"](m, opt), m.ExponentialLR(opt, 0.5)], [4])


def test_chain_as_first_part_of_a_sequence():
    """torch's has stepped the chain once before the first step."""
    expected = [0.01, 0.009, 0.0081, 0.00729, 0.1, 0.05]
    assert [row[0][0] for row in run(nested_first(OURS, optimizer()), 6)] == pytest.approx(expected, rel=1e-12, abs=0)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        theirs = nested_first(TORCH, optimizer())
    assert [row[0][0] for row in run(theirs, 4)] == pytest.approx([0.009, 0.0081, 0.00729, 0.006561], rel=1e-12, abs=0)


def test_a_link_that_raises_leaves_the_reductions_of_a_plateau():
    opt = optimizer()
    links = [OURS.OneCycleLR(opt, 0.8, total_steps=5, cycle_momentum=False), plateau(OURS, opt)]
    scheduler = OURS.ChainedScheduler(links)
    for _ in range(5):
        opt.step()
        scheduler.step(1.0)
    before = numbers(opt)
    assert scheduler._reductions[0] < 1.0
    with pytest.raises(ValueError, match="total steps is 5"):
        scheduler.step(1.0)
    assert numbers(opt) == before


@pytest.mark.parametrize("library", [OURS, TORCH])
@pytest.mark.parametrize("case", ["plateau", "chain", "sequence", "computed"])
def test_a_plateau_reduces_a_rate_of_several_groups_once(case, library):
    """The groups hold the same tensor: the default of an optimizer."""

    def make(opt):
        plateau = library.ReduceLROnPlateau(opt, patience=0, factor=0.5)
        if case == "plateau":
            return OURS.ReduceLROnPlateau(opt, patience=0, factor=0.5)
        if case == "sequence":
            return OURS.SequentialLR(opt, [OURS.LinearLR(opt, 0.5, total_iters=2), plateau], [2])
        first = OURS.ExponentialLR(opt, 0.9) if case == "chain" else OURS.LambdaLR(opt, lambda t: 1 / (1 + t))
        return OURS.ChainedScheduler([first, plateau])

    rates = []
    for shared in (True, False):
        lr = torch.tensor(0.1, dtype=torch.float64)
        opt = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)], lr=lr)
        for group in opt.param_groups if not shared else ():
            group["lr"] = lr.clone()
        scheduler = make(opt)
        rates.append([])
        for _ in range(6):
            rates[-1].append([group["lr"].item() for group in opt.param_groups])
            opt.step()
            scheduler.step(1.0)
        assert (opt.param_groups[0]["lr"] is lr) == (opt.param_groups[1]["lr"] is lr) == shared
    assert rates[0] == rates[1]
    assert rates[0][-1][0] < rates[0][0][0]


def test_sequence_in_a_sequence():
    def make(m, opt):
        inner = m.SequentialLR(opt, [m.ConstantLR(opt, 0.5, 30), m.ExponentialLR(opt, 0.9)], [2])
        return m.SequentialLR(opt, [m.StepLR(opt, 2, 0.1), inner], [3])

    expected = [0.1, 0.1, 0.01, 0.05, 0.05, 0.1, 0.09, 0.081]
    assert [row[0][0] for row in run(make(OURS, optimizer()), 8)] == pytest.approx(expected, rel=1e-12, abs=0)
    with pytest.raises(NotImplementedError):
        run(make(TORCH, optimizer()), 8)


def test_chain_as_second_part_of_a_sequence_in_a_sequence():
    opt = optimizer()
    chain = OURS.ChainedScheduler([OURS.ConstantLR(opt, 0.5, 30), OURS.ExponentialLR(opt, 0.9)])
    inner = OURS.SequentialLR(opt, [OURS.StepLR(opt, 9), chain], [2])
    scheduler = OURS.SequentialLR(opt, [inner, OURS.ExponentialLR(opt, 0.5)], [5])
    expected = [0.1, 0.1, 0.05, 0.045, 0.0405, 0.1, 0.05]
    assert [row[0][0] for row in run(scheduler, 7)] == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("make", [composed, nested_first], ids=["composed", "nested"])
def test_compositions_resumed_at_every_step(make):
    def step(scheduler):
        scheduler.optimizer.step()
        scheduler.step(1.0)
        return numbers(scheduler.optimizer)

    reference = make(OURS, optimizer())
    expected = [step(reference) for _ in range(30)]
    running = make(OURS, optimizer())
    for t in range(20):
        states = copy.deepcopy((running.optimizer.state_dict(), running.state_dict()))
        resumed = make(OURS, optimizer())
        resumed.optimizer.load_state_dict(states[0])
        resumed.load_state_dict(states[1])
        assert [step(resumed) for _ in range(10)] == expected[t : t + 10], t
        step(running)


# -- schedules without steps -------------------------------------------------------------------------------------------

NO_STEPS = {
    "linear": lambda m, opt: m.LinearLR(opt, total_iters=0),
    "linear to zero": lambda m, opt: m.LinearLR(opt, 1.0, 0.0, total_iters=0),
    "polynomial": lambda m, opt: m.PolynomialLR(opt, total_iters=0),
    "warm-up switched off": lambda m, opt: m.SequentialLR(
        opt, [m.LinearLR(opt, 0.1, total_iters=0), m.CosineAnnealingLR(opt, 7)], [0]
    ),
    "sequence": lambda m, opt: m.SequentialLR(opt, [m.LinearLR(opt, 0.1, total_iters=0), m.StepLR(opt, 2)], [3]),
}


@pytest.mark.parametrize("case", NO_STEPS)
def test_schedules_without_steps_are_torchs(case):
    ours, theirs = (run(NO_STEPS[case](m, optimizer()), 8) for m in (OURS, TORCH))
    assert ours == theirs


@pytest.mark.parametrize("case", ["linear", "linear to zero", "polynomial"])
def test_schedules_without_steps_on_an_optimizer_whose_rate_is_zero(case):
    """There is no closed form to begin from; the rate stays, as with torch's."""

    def second(m):
        scheduler = m.LinearLR(optimizer(), 1.0, 0.0, total_iters=4)
        run(scheduler, 4)
        return run(NO_STEPS[case](m, scheduler.optimizer), 5)

    assert second(OURS) == second(TORCH)


def test_a_cosine_without_steps_fails_in_its_first_step_as_torchs():
    for m in (TORCH, OURS):
        scheduler = m.CosineAnnealingLR(optimizer(), 0)
        assert numbers(scheduler.optimizer)[0][0] == 0.1
        scheduler.optimizer.step()
        with pytest.raises(ZeroDivisionError):
            scheduler.step()


# -- parameter groups that are added in mid-run ------------------------------------------------------------------------


def add_group(opt, **options):
    opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.3, **options})


def outcome(m, case, opt):
    """The rates of 60 steps with a group added after the third, or the error and whether it came before any change."""
    scheduler = ALL[case](m, opt)
    run(scheduler, 3)
    add_group(opt)
    rows = []
    for t in range(3, 60):
        before = str([{k: v for k, v in vars(scheduler).items() if k != "optimizer"}, opt.param_groups])
        before += str([vars(part) for part in getattr(scheduler, "_schedulers", [])])
        try:
            rows += run(scheduler, 1, t)
        except (ValueError, KeyError, RuntimeError) as error:
            after = str([{k: v for k, v in vars(scheduler).items() if k != "optimizer"}, opt.param_groups])
            after += str([vars(part) for part in getattr(scheduler, "_schedulers", [])])
            return error, after == before
    return rows


# What has arguments for each group, or would not know what to do with another.
FOR_THEIR_GROUPS = [
    *("LambdaLR-1", "MultiplicativeLR-1", "ReduceLROnPlateau-2", "sequence of four", "chain with a cycle"),
    *(case for case in ALL if case.startswith(("CyclicLR", "OneCycleLR", "SWALR"))),
]


@pytest.mark.parametrize("case", ALL)
def test_a_group_is_taken_up_or_refused_before_anything_moves(case):
    theirs, ours = outcome(TORCH, case, optimizer()), outcome(OURS, case, optimizer())
    assert isinstance(ours, tuple) == (case in FOR_THEIR_GROUPS)
    if isinstance(ours, tuple):
        error, unchanged = ours
        assert unchanged
        if "Plateau" in case:
            assert str(error) == str(theirs[0])
        else:
            assert isinstance(error, ValueError)
            assert "parameter group 2 was added" in str(error)
    elif not isinstance(theirs, tuple):
        assert ours == theirs


def test_the_rates_of_a_group_that_was_taken_up():
    """torch's raise a bare zip() error in all of these, the cosine only where it turns."""

    def third(make, steps, lr=0.3):
        opt = optimizer()
        scheduler = make(opt)
        run(scheduler, 3)
        add_group(opt, lr=lr)
        return [row[2][0] for row in run(scheduler, steps, 3)]

    assert third(lambda o: OURS.LambdaLR(o, lambda t: 1 / (1 + t)), 4) == [
        0.3,
        0.3 * (1 / 5),
        0.3 * (1 / 6),
        0.3 * (1 / 7),
    ]
    assert third(lambda o: OURS.MultiplicativeLR(o, lambda t: 0.5), 4) == [0.3, 0.15, 0.075, 0.0375]
    cosine = [0.3, *(0.3 * (1 + math.cos(math.pi * t / 5)) / 2 for t in (4, 0, 1, 2))]
    assert third(lambda o: OURS.CosineAnnealingWarmRestarts(o, 5), 5) == cosine
    sequence = third(lambda o: OURS.SequentialLR(o, [OURS.StepLR(o, 9), OURS.ExponentialLR(o, 0.5)], [5]), 5)
    assert sequence == [0.3, 0.3, 0.3, 0.15, 0.075]
    turning = third(lambda o: OURS.CosineAnnealingLR(o, 5), 9)
    assert max(turning) < 1.0


def test_a_group_under_a_plateau_in_a_chain():
    opt = optimizer()
    scheduler = OURS.ChainedScheduler([OURS.ExponentialLR(opt, 0.5), plateau(OURS, opt)])
    for t in range(7):
        if t == 4:
            assert opt.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**4 * 0.5, rel=1e-12)
            add_group(opt)
        opt.step()
        scheduler.step(1.0)
    # The plateau, which has halved the others before, halves all in the step to 5 and in that to 7.
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**7 * 0.5**3, rel=1e-12)
    assert opt.param_groups[2]["lr"] == pytest.approx(0.3 * 0.5**3 * 0.5**2, rel=1e-12)


@pytest.mark.parametrize("m", [OURS, TORCH], ids=["ours", "torch's"])
def test_a_plateau_with_its_own_lowest_rates_refuses_a_group_within_others(m):
    opt = optimizer()
    links = [m.ExponentialLR(opt, 0.5), m.ReduceLROnPlateau(opt, min_lr=[0.1, 0.2])]
    scheduler = OURS.SequentialLR(opt, [OURS.ChainedScheduler(links)], [])
    add_group(opt)
    opt.step()
    before = [numbers(opt), str(scheduler.state_dict())[:-200]]
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau: parameter group 2 was added .* min_lr is a list"):
        scheduler.step(1.0)
    assert [scheduler.last_epoch, links[0].last_epoch] == [0, 0]
    assert numbers(opt) == before[0]


def test_a_group_that_brings_what_the_scheduler_reads():
    """As with torch's."""
    for m in (TORCH, OURS):
        opt = optimizer()
        scheduler = m.OneCycleLR(opt, 0.1, 20)
        run(scheduler, 3)
        keys = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")
        add_group(opt, **{key: opt.param_groups[0][key] for key in keys})
        run(scheduler, 3, 3)
        assert numbers(opt)[2] == numbers(opt)[0]
        opt = optimizer()
        scheduler = m.SWALR(opt, 0.05, anneal_epochs=3)
        add_group(opt, swa_lr=0.2)
        run(scheduler, 5)
        assert numbers(opt)[2][0] == pytest.approx(0.2)


def test_a_tensor_rate_of_a_new_group_stays_its_own():
    opt = optimizer(tensor_lr=True)
    scheduler = OURS.LambdaLR(opt, lambda t: 0.5**t)
    lr = torch.tensor(0.4, dtype=torch.float64)
    add_group(opt, lr=lr)
    run(scheduler, 3)
    assert opt.param_groups[2]["lr"] is lr
    assert float(lr) == 0.05
    assert float(opt.param_groups[2]["initial_lr"]) == 0.4
