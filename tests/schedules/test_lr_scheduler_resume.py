"""Resuming a schedule, in whatever order things are made and loaded: the rates of the run that never stopped."""

import copy
import io
import itertools

import onepass
import pytest
import torch
from onepass.lr_scheduler import ScheduleLR
from schedulers import ALL, ARGUMENTS, CHAININGS, OURS, TORCH, advance, metric, numbers, optimizer, run, takes_metrics

STEPS, AHEAD = 46, 14
STOPS = [0, 1, 2, 3, 5, 7, 9, 10, 11, 20, 21, 31, 39, 40, 45]
LATER = "optimizer loaded, scheduler made, scheduler loaded"
ORDERS = ["both made, optimizer loaded, scheduler loaded", LATER, "both made, scheduler loaded, optimizer loaded"]


def saved(*parts):
    """The states of an optimizer and its schedulers, through a file."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resume(order, new, make, states):
    """An optimizer and the list of its schedulers, made anew and loaded."""
    opt = new()
    if order == LATER:
        opt.load_state_dict(states[0])
        schedulers = make(opt)
    else:
        schedulers = make(opt)
        if order == ORDERS[0]:
            opt.load_state_dict(states[0])
    for scheduler, state in zip(schedulers, states[1:], strict=True):
        scheduler.load_state_dict(state)
    if order == ORDERS[2]:
        opt.load_state_dict(states[0])
    return opt, schedulers


def for_one_group(case):
    name, _, number = case.partition("-")
    arguments = ARGUMENTS[name][int(number)] if name in ARGUMENTS and number else {}
    return not any(isinstance(value, list) for key, value in arguments.items() if key != "milestones")


def one_group(package=onepass, tensor_lr=False):
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
    return package.SGD([torch.nn.Parameter(torch.zeros(2))], lr=lr, momentum=0.9)


def combined(tensor_lr=False):
    """The groups of ``optimizer``, each in an optimizer of its own."""
    groups = optimizer(tensor_lr=tensor_lr).param_groups
    return onepass.Combined([onepass.SGD(group["params"], lr=group["lr"], momentum=0.9) for group in groups])


def lookahead_of_combined(tensor_lr=False):
    return onepass.Lookahead(combined(tensor_lr))


CASES = [
    *((case, optimizer) for case in ALL),
    *((case, one_group) for case in filter(for_one_group, ALL)),
    *((f"{name}-0", combined) for name in ARGUMENTS),
]


@pytest.mark.slow
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("case", "new"), CASES, ids=[f"{case}-{new.__name__}" for case, new in CASES])
def test_every_scheduler_in_every_order(case, new, order, tensor_lr):
    def fresh():
        return new(tensor_lr=tensor_lr)

    expected = run(ALL[case](OURS, fresh()), STEPS + AHEAD)
    running = ALL[case](OURS, fresh())
    for t in range(STEPS):
        if t in STOPS:
            states = saved(running.optimizer, running)
            before = copy.deepcopy(states)
            opt, (resumed,) = resume(order, fresh, lambda opt: [ALL[case](OURS, opt)], states)
            assert str(states) == str(before)
            assert resumed.get_last_lr() == [group["lr"] for group in opt.param_groups], t
            assert run(resumed, AHEAD, t) == expected[t : t + AHEAD], t
        advance(running, t)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", ALL)
def test_states_of_torch_in_every_order(case, order):
    expected = run(ALL[case](TORCH, optimizer()), STEPS + AHEAD)
    running = ALL[case](TORCH, optimizer())
    for t in range(STEPS):
        if t in STOPS:
            states = saved(running.optimizer, running)
            _, (resumed,) = resume(order, optimizer, lambda opt: [ALL[case](OURS, opt)], states)
            assert run(resumed, AHEAD, t) == expected[t : t + AHEAD], t
        advance(running, t)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", [case for case in ALL if case.startswith(("CyclicLR", "OneCycleLR"))])
def test_betas_in_every_order(case, order):
    def new():
        groups = [{"params": [torch.nn.Parameter(torch.zeros(2))]} for _ in range(2)]
        return onepass.AdamW(groups, lr=0.1, betas=(0.7, 0.999))

    def rows(scheduler, n):
        found = []
        for _ in range(n):
            found.append([(group["lr"], group["betas"]) for group in scheduler.optimizer.param_groups])
            scheduler.optimizer.step()
            scheduler.step()
        return found

    expected = rows(ALL[case](OURS, new()), STEPS + AHEAD)
    for t in STOPS:
        running = ALL[case](OURS, new())
        rows(running, t)
        states = saved(running.optimizer, running)
        _, (resumed,) = resume(order, new, lambda opt: [ALL[case](OURS, opt)], states)
        assert rows(resumed, AHEAD) == expected[t : t + AHEAD], t


def plateau(m, opt):
    return m.ReduceLROnPlateau(opt, factor=0.5, patience=1)


COMPOSITIONS = {
    **CHAININGS,
    "chain with a plateau": lambda m, opt: m.ChainedScheduler(
        [m.OneCycleLR(opt, 0.1, 100), plateau(m, opt), m.ExponentialLR(opt, 0.9)]
    ),
    "plateau after a warm-up": lambda m, opt: m.SequentialLR(
        opt, [m.LinearLR(opt, 0.1, total_iters=8), plateau(m, opt)], [8]
    ),
    "chain in a sequence in a chain": lambda m, opt: m.ChainedScheduler(
        [
            m.SequentialLR(
                opt,
                [
                    m.LinearLR(opt, 0.25, total_iters=4),
                    m.ChainedScheduler([m.LambdaLR(opt, lambda t: 1 / (1 + t)), plateau(m, opt)]),
                    m.CyclicLR(opt, 0.001, 0.1, 7),
                ],
                [4, 20],
            ),
            m.ExponentialLR(opt, 0.99),
        ]
    ),
    "sequence of cycles": lambda m, opt: m.SequentialLR(
        opt, [m.CyclicLR(opt, 0.001, 0.1, 4), m.StepLR(opt, 3), m.OneCycleLR(opt, 0.2, 40)], [9, 21]
    ),
    "torch's cycles in a sequence of ours": lambda m, opt: OURS.SequentialLR(
        opt, [TORCH.CyclicLR(opt, 0.001, 0.1, 4), TORCH.StepLR(opt, 3), TORCH.OneCycleLR(opt, 0.2, 40)], [9, 21]
    ),
    "drivers of momentum beside each other": lambda m, opt: m.ChainedScheduler(
        [
            m.SequentialLR(opt, [m.CyclicLR(opt, 0.001, 0.1, 4), m.StepLR(opt, 3)], [9]),
            ScheduleLR(opt, "warmup(5) >> cosine(30)", momentum="linear(90)"),
            m.SequentialLR(opt, [m.OneCycleLR(opt, 0.2, 40), m.ExponentialLR(opt, 0.9)], [15]),
        ]
    ),
    "ScheduleLR": lambda m, opt: ScheduleLR(
        opt, ["warmup(5) >> cosine(30)", "step(7)"], momentum="linear(70)", plateau={"patience": 2, "factor": 0.5}
    ),
    "ScheduleLR in a sequence": lambda m, opt: m.SequentialLR(
        opt,
        [
            m.LinearLR(opt, 0.25, total_iters=4),
            ScheduleLR(opt, "sqrt(9)", momentum="linear(50)"),
            ScheduleLR(opt, "sqrt(9)", momentum="sqrt(50, end=0.5)"),
        ],
        [6, 20],
    ),
}


def step(scheduler, t):
    scheduler.optimizer.step()
    composed = isinstance(scheduler, OURS.SequentialLR | OURS.ChainedScheduler)
    if composed or takes_metrics(scheduler) or (t % 2 and getattr(scheduler, "_plateau", None)):
        scheduler.step(metric(t))
    else:
        scheduler.step()


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("new", [optimizer, lookahead_of_combined])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", COMPOSITIONS)
def test_compositions_in_every_order(case, order, new, tensor_lr):
    def fresh():
        return new(tensor_lr=tensor_lr)

    def rows(scheduler, n, begin=0):
        found = []
        for t in range(begin, begin + n):
            found.append(numbers(scheduler.optimizer))
            step(scheduler, t)
        return found

    expected = rows(COMPOSITIONS[case](OURS, fresh()), STEPS + AHEAD)
    running = COMPOSITIONS[case](OURS, fresh())
    for t in range(STEPS):
        if t in STOPS:
            states = saved(running.optimizer, running)
            _, (resumed,) = resume(order, fresh, lambda opt: [COMPOSITIONS[case](OURS, opt)], states)
            assert rows(resumed, AHEAD, t) == expected[t : t + AHEAD], t
        step(running, t)


# -- several on one optimizer, stepped by hand -------------------------------------------------------------------------

BY_HAND = {
    "exponential and stairs": lambda m, opt: [m.ExponentialLR(opt, 0.9), m.MultiStepLR(opt, [4, 11, 40], 0.5)],
    "a warm-up and a cosine": lambda m, opt: [m.LinearLR(opt, 0.1, total_iters=8), m.CosineAnnealingLR(opt, 30)],
    "a cycle and a factor": lambda m, opt: [m.CyclicLR(opt, 0.001, 0.1, 7), m.MultiplicativeLR(opt, lambda t: 0.9)],
    "a plateau and stairs": lambda m, opt: [plateau(m, opt), m.StepLR(opt, 7)],
    "weight averaging in the end": lambda m, opt: [m.CosineAnnealingLR(opt, 40), m.SWALR(opt, 0.05)],
}


def step_by_hand(schedulers, t):
    schedulers[0].optimizer.step()
    for scheduler in schedulers[-1:] if t >= 20 and type(schedulers[-1]).__name__ == "SWALR" else schedulers[:]:
        if type(scheduler).__name__ == "SWALR" and t < 20:
            continue
        step(scheduler, t)


def rows_by_hand(schedulers, n, begin=0):
    found = []
    for t in range(begin, begin + n):
        found.append(numbers(schedulers[0].optimizer))
        step_by_hand(schedulers, t)
    return found


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("new", [optimizer, combined])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", BY_HAND)
def test_several_by_hand_in_every_order(case, order, new, backwards):
    expected = rows_by_hand(BY_HAND[case](OURS, new()), STEPS + AHEAD)
    for t in STOPS:
        running = BY_HAND[case](OURS, new())
        rows_by_hand(running, t)
        states = saved(running[0].optimizer, *running[:: -1 if backwards else 1])
        _, resumed = resume(order, new, lambda opt: BY_HAND[case](OURS, opt)[:: -1 if backwards else 1], states)
        assert rows_by_hand(resumed[:: -1 if backwards else 1], AHEAD, t) == expected[t : t + AHEAD], t


@pytest.mark.parametrize("order", [ORDERS[0], ORDERS[2]])
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("case", BY_HAND)
def test_several_of_torch_by_hand(case, order, backwards):
    """Their states do not tell the optimizer's rates: these are the loaded optimizer's."""
    expected = rows_by_hand(BY_HAND[case](TORCH, optimizer()), STEPS + AHEAD)
    for t in STOPS:
        running = BY_HAND[case](TORCH, optimizer())
        rows_by_hand(running, t)
        states = saved(running[0].optimizer, *running[:: -1 if backwards else 1])
        _, resumed = resume(order, optimizer, lambda opt: BY_HAND[case](OURS, opt)[:: -1 if backwards else 1], states)
        assert rows_by_hand(resumed[:: -1 if backwards else 1], AHEAD, t) == expected[t : t + AHEAD], t


@pytest.mark.parametrize("new", [optimizer, combined])
def test_a_rate_that_is_set_after_the_optimizer_was_loaded_stays(new):
    """As with torch's: 1/10 of the rate, set between the two loads."""
    running = OURS.StepLR(new(), 4)
    run(running, 3)
    states = saved(running.optimizer, running)
    opt = new()
    resumed = OURS.StepLR(opt, 4)
    opt.load_state_dict(states[0])
    opt.param_groups[0]["lr"] = 0.01
    resumed.load_state_dict(states[1])
    assert [lr for lr, _ in numbers(opt)] == [0.01, 0.02]


@pytest.mark.parametrize("new", [optimizer, combined, lookahead_of_combined])
def test_a_scheduler_alone_puts_its_rates_into_the_groups(new):
    for case in ALL:
        running = ALL[case](OURS, new())
        run(running, 9)
        opt = new()
        ALL[case](OURS, opt).load_state_dict(saved(running)[0])
        assert numbers(opt) == numbers(running.optimizer), case


def test_a_scheduler_of_which_one_group_is_new_puts_its_rates_into_all_groups():
    """A group was added, or one optimizer of Combined was loaded: most groups are those of the scheduler."""
    running = OURS.ExponentialLR(combined(), 0.5)
    run(running, 3)
    opt = combined()
    scheduler = OURS.ExponentialLR(opt, 0.5)
    opt.optimizers[0].load_state_dict(running.optimizer.optimizers[0].state_dict())
    scheduler.load_state_dict(running.state_dict())
    assert numbers(opt) == numbers(running.optimizer)

    def add(opt):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.3})

    for new in (optimizer, combined):
        running = OURS.ExponentialLR(new(), 0.5)
        add(running.optimizer)
        run(running, 3)
        opt = new()
        scheduler = OURS.ExponentialLR(opt, 0.5)
        add(opt)
        scheduler.load_state_dict(running.state_dict())
        assert numbers(opt) == numbers(running.optimizer)


@pytest.mark.parametrize(
    "new",
    [
        lambda: onepass.SAM(combined()),
        lambda: onepass.create("muon", torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)), lr=0.1),
    ],
    ids=["SAM", "muon"],
)
@pytest.mark.parametrize("order", ORDERS)
def test_optimizers_of_several_in_every_order(new, order):
    def rates(opt):
        return [group["lr"] for group in opt.param_groups]

    running = OURS.LinearLR(new(), 0.1, total_iters=10)
    for _ in range(5):
        running.optimizer.step(lambda: torch.zeros(()))
        running.step()
    states = saved(running.optimizer, running)
    opt, _ = resume(order, new, lambda opt: [OURS.LinearLR(opt, 0.1, total_iters=10)], states)
    assert rates(opt) == rates(running.optimizer)


def test_a_state_of_a_float_rate_into_a_tensor_and_back():
    running = OURS.ExponentialLR(optimizer(), 0.9)
    run(running, 3)
    opt = optimizer(tensor_lr=True)
    held = [group["lr"] for group in opt.param_groups]
    resumed = OURS.ExponentialLR(opt, 0.9)
    resumed.load_state_dict(running.state_dict())
    assert all(group["lr"] is lr for group, lr in zip(opt.param_groups, held, strict=True))
    assert numbers(opt) == numbers(running.optimizer)
    other = optimizer()
    OURS.ExponentialLR(other, 0.9).load_state_dict(resumed.state_dict())
    assert [type(group["lr"]) for group in other.param_groups] == [float, float]
    assert numbers(other) == numbers(opt)


def test_the_state_tells_the_rates_that_the_groups_hold():
    opt = optimizer()
    first, second = OURS.ExponentialLR(opt, 0.5), OURS.ExponentialLR(opt, 0.5)
    opt.step()
    first.step()
    second.step()
    assert first.get_last_lr() == [0.05, 0.01]
    assert first.state_dict()["_last_lr"] == second.state_dict()["_last_lr"] == [0.025, 0.005]
    torchs = TORCH.ExponentialLR(optimizer(), 0.5)
    torchs.load_state_dict(first.state_dict())
    assert torchs.get_last_lr() == [0.025, 0.005]


@pytest.mark.parametrize(
    "case", [*filter(for_one_group, ALL), *(c for c in COMPOSITIONS if c not in {"ScheduleLR", *ALL})]
)
def test_a_state_of_another_number_of_groups_changes_nothing(case):
    make = {**ALL, **COMPOSITIONS}[case]
    running = make(OURS, one_group())
    for t in range(3):
        step(running, t) if case in COMPOSITIONS else advance(running, t)
    opt = optimizer()
    scheduler = make(OURS, opt)
    before = str([scheduler.state_dict(), opt.param_groups])
    with pytest.raises(ValueError, match=r"state_dict has 1 parameter groups?.*2"):
        scheduler.load_state_dict(running.state_dict())
    assert str([scheduler.state_dict(), opt.param_groups]) == before


def test_a_state_of_another_number_of_schedulers_changes_nothing():
    def chain(links):
        opt = optimizer()
        return OURS.ChainedScheduler([OURS.ExponentialLR(opt, 0.9) for _ in range(links)])

    running, scheduler = chain(2), chain(3)
    advance(running, 0)
    before = str(scheduler.state_dict())
    with pytest.raises(ValueError, match="state_dict has 2 schedulers, but this ChainedScheduler has 3"):
        scheduler.load_state_dict(running.state_dict())
    assert str(scheduler.state_dict()) == before


@pytest.mark.parametrize("nested", [False, True])
def test_a_state_of_one_scheduler_is_not_that_of_a_composition(nested):
    def one(opt):
        return OURS.ExponentialLR(opt, 0.9)

    def several(opt):
        return OURS.ChainedScheduler([one(opt), one(opt)])

    def within(make):
        return lambda opt: OURS.SequentialLR(opt, [one(opt), make(opt)], [2])

    for saved, made, why in (
        (one, several, "has no schedulers, but this ChainedScheduler has 2"),
        (several, one, "has 2 schedulers, but this ExponentialLR has no schedulers"),
    ):
        running, scheduler = ((within(make) if nested else make)(optimizer()) for make in (saved, made))
        for t in range(3):
            advance(running, t)
        before = str([scheduler.state_dict(), scheduler.optimizer.param_groups])
        with pytest.raises(ValueError, match=f"^state_dict {why}"):
            scheduler.load_state_dict(running.state_dict())
        assert str([scheduler.state_dict(), scheduler.optimizer.param_groups]) == before


def test_copies_resume_as_well():
    for how in (copy.deepcopy, lambda x: x):
        running = OURS.PolynomialLR(optimizer(), 9)
        run(running, 4)
        opt = optimizer()
        opt.load_state_dict(running.optimizer.state_dict())
        resumed = how(OURS.PolynomialLR(opt, 9))
        resumed.load_state_dict(running.state_dict())
        assert numbers(resumed.optimizer) == numbers(running.optimizer)


def test_own_subclass_in_every_order():
    class Root(OURS.LRScheduler):
        def get_lr(self):
            return [lr / (1 + self.last_epoch) ** 0.5 for lr in self.base_lrs]

    expected = run(Root(optimizer()), STEPS + AHEAD)
    for order, t in itertools.product(ORDERS, STOPS):
        running = Root(optimizer())
        run(running, t)
        _, (resumed,) = resume(order, optimizer, lambda opt: [Root(opt)], saved(running.optimizer, running))
        assert run(resumed, AHEAD, t) == expected[t : t + AHEAD]


WITH_ADDED = {
    "LambdaLR": lambda opt: OURS.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "ExponentialLR": lambda opt: OURS.ExponentialLR(opt, 0.9),
    "CosineAnnealingWarmRestarts": lambda opt: OURS.CosineAnnealingWarmRestarts(opt, 5, 2),
    "sequence": lambda opt: OURS.SequentialLR(opt, [OURS.LambdaLR(opt, lambda t: 0.8), OURS.StepLR(opt, 2)], [7]),
    "chain": lambda opt: OURS.ChainedScheduler([OURS.LambdaLR(opt, lambda t: 1 / (1 + t)), plateau(OURS, opt)]),
    "ScheduleLR": lambda opt: ScheduleLR(opt, "sqrt(9)", momentum="linear(30)", plateau={"patience": 2}),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", WITH_ADDED)
def test_a_checkpoint_right_after_a_group_was_added(case, order):
    """Before the step in which the group is taken up; the run is resumed with all its groups."""

    def add(opt):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.3})
        return opt

    running = WITH_ADDED[case](optimizer())
    for t in range(4):
        step(running, t)
    states = saved(add(running.optimizer), running)
    _, (resumed,) = resume(order, lambda: add(optimizer()), lambda opt: [WITH_ADDED[case](opt)], states)
    for t in range(4, 15):
        assert numbers(resumed.optimizer) == numbers(running.optimizer), t
        step(running, t)
        step(resumed, t)


def test_a_part_of_a_sequence_that_has_not_begun_writes_no_momentum():
    """Also one that was constructed with a last_epoch."""

    def momentum_after_loading(library):
        opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.5)
        opt.param_groups[0]["initial_lr"] = 0.1
        parts = [library.StepLR(opt, 2), library.CyclicLR(opt, 0.01, 0.2, step_size_up=2, last_epoch=2)]
        sequence = library.SequentialLR(opt, parts, [3])
        sequence.load_state_dict(copy.deepcopy(sequence.state_dict()))
        return opt.param_groups[0]["momentum"]

    assert momentum_after_loading(onepass.lr_scheduler) == momentum_after_loading(torch.optim.lr_scheduler)


@pytest.mark.parametrize("order", ORDERS)
def test_hyperparameters_of_a_part_that_has_finished(order):
    """A group that was added after the part, and a number that was set by hand, are not those of the schedule."""

    def make(opt):
        decayed = ScheduleLR(opt, "cosine(20)", weight_decay="linear(9, end=0.5)")
        return [OURS.SequentialLR(opt, [decayed, OURS.ExponentialLR(opt, 0.9)], [3])]

    def decays(opt):
        return [group["weight_decay"] for group in opt.param_groups]

    def new(groups):
        return onepass.SGD([{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(groups)], weight_decay=0.1)

    opt = new(1)
    (running,) = make(opt)
    run(running, 5)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": 0.1})
    run(running, 2)
    assert decays(opt)[0] < decays(opt)[1] == 0.1
    for by_hand in (None, 0.3):
        if by_hand is not None:
            opt.param_groups[0]["weight_decay"] = by_hand
        resumed, _ = resume(order, lambda: new(2), make, saved(opt, running))
        assert decays(resumed) == decays(opt)
