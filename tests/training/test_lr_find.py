"""The learning rate range test: what it measures and suggests, and that it leaves no trace."""

import copy
import math
import random
import signal
import sys
import warnings

import matplotlib
import numpy as np
import onepass
import pytest
import torch
from matplotlib import pyplot
from onepass import LRRangeTest, lr_find
from onepass.cli import lr_find as lr_find_command
from onepass.cli.demo import ARGUMENTS, CLASSES, digits
from onepass.optimizers.tail import Slots, Tail
from onepass.swa_utils import AveragedModel
from onepass.training import lr_finder
from onepass.training.restoring import restored
from reference import bits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

matplotlib.use("agg")

pytestmark = pytest.mark.usefixtures("one_thread")

cross_entropy = nn.functional.cross_entropy


# -- what it measures ------------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """The loss c x^2 / 2, whatever the batch: SGD multiplies x by 1 - lr c, and diverges from lr = 2 / c on."""

    def __init__(self, curvature):
        super().__init__()
        self.curvature = curvature
        self.x = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, _):
        return self.curvature * self.x**2 / 2


def find_on_quadratic(curvature=10.0, make=torch.optim.SGD, lr=1.0, **kwargs):
    model = Quadratic(curvature)
    return lr_find(
        model, make(model.parameters(), lr=lr), None, [0], forward=lambda m, b: m(b), progress=False, **kwargs
    )


def quadratic_losses(curvature, lrs):
    return curvature / 2 * np.cumprod(np.concatenate([[1.0], 1 - lrs[:-1] * curvature])) ** 2


@pytest.mark.parametrize("make", [torch.optim.SGD, onepass.SGD])
@pytest.mark.parametrize("curvature", [0.3, 10.0])
@pytest.mark.parametrize(("ramp", "rates"), [("exponential", np.geomspace), ("linear", np.linspace)])
def test_a_quadratic_diverges_at_two_over_its_curvature(make, curvature, ramp, rates):
    expected_lrs = rates(0.01 / curvature, 5 / curvature, 80)
    found = find_on_quadratic(
        curvature, make, start=0.01 / curvature, end=5 / curvature, steps=80, ramp=ramp, smoothing=0
    )
    assert found.diverged
    n = len(found.lrs)
    assert n < 80
    assert (found.lrs == expected_lrs[:n]).all()
    # A step subtracts two numbers that may nearly cancel (at lr = 1 / c), and such errors are kept by all that follow.
    expected = quadratic_losses(curvature, expected_lrs)
    near = np.cumsum(np.abs(expected_lrs * curvature) / np.abs(1 - expected_lrs * curvature))
    room = 8 * np.finfo(float).eps * (np.arange(80) + np.concatenate([[0], near[:-1]]))
    assert (np.abs(found.losses / expected[:n] - 1) <= room[:n]).all()
    assert (found.smoothed == found.losses).all()
    # It falls with every rate below 2 / c, and rises with every one above.
    assert ((np.diff(found.losses) < 0) == (found.lrs[:-1] < 2 / curvature)).all()
    # The end is the first loss above four times the lowest.
    above = found.losses > 4 * np.minimum.accumulate(found.losses)
    assert above.tolist() == [False] * (n - 1) + [True]


def test_smoothing_is_a_running_average_without_bias():
    found = find_on_quadratic(end=0.1, steps=30, smoothing=0.7)
    weights = 0.7 ** np.subtract.outer(np.arange(30), np.arange(30)).astype(float) * np.tri(30)
    expected = weights @ found.losses / weights.sum(1)
    assert not found.diverged
    np.testing.assert_allclose(found.smoothed, expected, rtol=1e-14)


@pytest.mark.parametrize("sign", [1, -1])
def test_divergence_is_relative_to_the_lowest_loss_also_of_a_negative_one(sign):
    losses = iter([sign * 1.0, sign * 1.0, sign * 1.0 + 2.9, sign * 1.0 + 3.1, 0.0])
    w = nn.Parameter(torch.zeros(()))
    model = nn.ParameterList([w])
    found = lr_find(
        model,
        torch.optim.SGD([w], lr=1),
        None,
        [0],
        forward=lambda *_: w * 0 + next(losses),
        smoothing=0,
        steps=5,
        progress=False,
    )
    assert found.diverged
    assert len(found.losses) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 6])
def test_a_loss_that_is_not_finite_ends_it(bad, at):
    model, optimizer = trained()
    calls = []

    def loss_fn(output, target):
        calls.append(0)
        return cross_entropy(output, target) + (bad if len(calls) == at + 1 else 0.0)

    before = everything(model, optimizer)
    found = lr_find(model, optimizer, loss_fn, batches(), diverges_at=math.inf, progress=False)
    assert found.diverged
    assert len(found.lrs) == len(found.losses) == len(found.smoothed) == at + 1
    assert np.isfinite(found.losses[:-1]).all()
    np.testing.assert_equal(found.losses[-1], bad)
    assert everything(model, optimizer) == before
    assert str(found)


def test_accumulated_batches_are_one():
    """Losses and steps of four batches of five are those of one of twenty."""
    data = torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))
    results = []
    for size in (5, 20):
        torch.manual_seed(1)
        model = nn.Linear(6, 3).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loader = DataLoader(TensorDataset(*data), batch_size=size)
        results.append(
            lr_find(model, optimizer, cross_entropy, loader, accumulate=20 // size, progress=False, steps=20)
        )
    assert len(results[0].losses) == len(results[1].losses)
    np.testing.assert_allclose(results[0].losses, results[1].losses, rtol=1e-11)


def test_groups_keep_their_ratios_and_tensors_stay():
    a, b, c = (nn.Parameter(torch.ones(())) for _ in range(3))
    shared = torch.tensor(0.5)
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": shared}, {"params": [c], "lr": 0.0}])
    seen = []

    def forward(*_):
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        assert optimizer.param_groups[1]["lr"] is shared
        return (a + b + c) ** 2

    found = lr_find(
        nn.ParameterList([a, b, c]), optimizer, None, [0], forward=forward, steps=7, end=1e-3, progress=False
    )
    expected = np.outer(found.lrs, [0.2, 1.0, 0.0])
    np.testing.assert_allclose(seen, expected, rtol=2**-23)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, shared, 0.0]
    assert shared == 0.5


def test_rates_that_a_warm_up_has_set_to_zero():
    a, b = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.4}])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 10)
    seen = []

    def forward(*_):
        seen.append([group["lr"] for group in optimizer.param_groups])
        return (a + b) ** 2

    found = lr_find(nn.ParameterList([a, b]), optimizer, None, [0], forward=forward, steps=5, end=1e-3, progress=False)
    np.testing.assert_allclose(seen, np.outer(found.lrs, [0.25, 1.0]), rtol=1e-15)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_batches_of_other_kinds():
    """A dict and a forward of its own; a loader is begun anew."""
    model = nn.Linear(4, 1)
    optimizer = onepass.AdamW(model.parameters())
    loader = [{"x": torch.randn(3, 4), "more": (torch.randn(3), [torch.randn(1)], "text")} for _ in range(2)]
    seen = []

    def forward(net, batch):
        seen.append(batch["x"])
        assert batch["more"][2] == "text"
        return (net(batch["x"]) - batch["more"][0].unsqueeze(1)).square().mean()

    lr_find(model, optimizer, None, loader, forward=forward, steps=7, end=1e-3, progress=False)
    assert [bits(x) for x in seen] == [bits(loader[i % 2]["x"]) for i in range(7)]


def test_batches_go_where_the_model_is():
    class Batch:
        def to(self, device):
            moved.append(device)
            return self

    moved = []
    w = nn.Parameter(torch.ones(()))
    options = {"forward": lambda *_: w**2, "steps": 2, "end": 1e-3, "progress": False}
    for device, expected in ((None, w.device), ("meta", "meta")):
        lr_find(nn.ParameterList([w]), torch.optim.SGD([w]), None, [[Batch()]], device=device, **options)
        assert moved == [expected] * 2
        moved.clear()


# -- what it leaves behind -------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Buffers, dropout, a frozen layer, one in eval mode, tied parameters, a repeated buffer, a counter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.frozen_norm = nn.BatchNorm1d(8).eval()
        self.dropout = nn.Dropout(0.3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.tied = nn.Linear(8, 8)
        self.tied_too = nn.Linear(8, 8)
        self.tied_too.weight = self.tied.weight
        self.last = nn.Linear(8, 3)
        self.register_buffer("repeated", torch.ones(1, 1).expand(1, 8))
        self.register_buffer("replaced", torch.zeros(()))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + 1
        x = self.dropout(self.frozen_norm(self.norm(self.first(x))) * self.repeated)
        return self.last(self.tied_too(self.tied(self.frozen(x).relu())))


def batches(n=5):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(9, 6, generator=generator), torch.randint(3, (9,), generator=generator)) for _ in range(n)]


def train(model, optimizer, loader, steps=3):
    taken = 0
    while taken < steps:
        for x, y in loader:

            def closure():
                optimizer.zero_grad()
                loss = cross_entropy(model(x), y)  # noqa: B023
                loss.backward()
                return loss

            optimizer.step(closure)
            taken += 1


MAKERS = {
    "AdamW": onepass.AdamW,
    "torch AdamW": torch.optim.AdamW,
    "torch fused": lambda ps: torch.optim.Adam(ps, fused=True),
    "SGD": lambda ps: onepass.SGD(ps, lr=0.01, momentum=0.9),
    "tensor lr": lambda ps: torch.optim.Adam(ps, lr=torch.tensor(1e-3)),
    "Adafactor": onepass.Adafactor,
    "Lookahead": lambda ps: onepass.Lookahead(onepass.Adam(ps), k=2),
    "Lookahead of torch": lambda ps: onepass.Lookahead(torch.optim.RMSprop(ps), k=2),
    "LBFGS": lambda ps: onepass.LBFGS(ps, lr=0.1, max_iter=3),
    "LBFGS, line search": lambda ps: onepass.LBFGS(ps, max_iter=3, line_search_fn="strong_wolfe"),
    "torch LBFGS": lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=3),
}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def trained(make=onepass.AdamW, steps=3):
    """A model and its optimizer in the middle of training, or at its beginning."""
    torch.manual_seed(0)
    model = Net()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, batches(), steps)
    return model, optimizer


def described(x, seen):
    """Values to the bit, and which objects they are in; of what has been described, which it is."""
    if isinstance(x, onepass.ClippingPolicy):
        return (id(x), str(x.state_dict()))
    if isinstance(x, nn.Module | torch.optim.Optimizer | Tail):
        x = vars(x)
    if id(x) in seen or not isinstance(x, torch.Tensor | dict | list | tuple):
        return x if isinstance(x, int | float | str | None) else id(x)
    seen.add(id(x))
    if isinstance(x, torch.Tensor):
        grad = described(x.grad, seen) if x.is_leaf else None
        return (id(x), x.data_ptr(), x.shape, x.stride(), bits(x), x.requires_grad, grad)
    if isinstance(x, dict):
        return (id(x), [(described(key, seen), described(value, seen)) for key, value in x.items()])
    return (id(x), [described(item, seen) for item in x])


def everything(model, optimizer):
    seen = set()
    state = [described(model, seen), described(optimizer, seen)]
    chance = [torch.get_rng_state().tolist(), random.getstate(), [str(x) for x in np.random.get_state()]]
    return [state, chance]


@pytest.mark.parametrize("steps", [0, 3], ids=["new", "trained"])
@each_maker
def test_all_is_as_before(make, steps):
    model, optimizer = trained(make, steps)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    before, schedule = everything(model, optimizer), copy.deepcopy(scheduler.state_dict())
    watched = []

    def loss_fn(output, target):
        watched.append(bits(model.first.weight))
        random.random(), np.random.rand()
        return cross_entropy(output, target)

    found = lr_find(model, optimizer, loss_fn, batches(), steps=12, start=1e-4, end=0.1, progress=False)
    assert len(found.losses) > 3
    assert len(set(watched)) > 3  # the parameters have indeed moved
    assert everything(model, optimizer) == before
    assert scheduler.state_dict() == schedule


@each_maker
def test_training_goes_on_as_if_there_had_been_no_test(make):
    ends = []
    for finds in (False, True):
        model, optimizer = trained(make)
        generator = torch.Generator().manual_seed(5)
        data = TensorDataset(*(torch.cat(column) for column in zip(*batches(), strict=True)))
        loaders = [
            DataLoader(data, batch_size=9, shuffle=True),
            DataLoader(data, batch_size=9, shuffle=True, generator=generator),
        ]
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        if finds:
            for loader in loaders:
                lr_find(model, optimizer, cross_entropy, loader, steps=9, start=1e-4, end=0.1, progress=False)
        for loader in loaders:
            train(model, optimizer, loader, 5)
            scheduler.step()
        ends.append([bits(x) for x in model.state_dict().values()])
    assert ends[0] == ends[1]


# -- what steps change beside the parameters --------------------------------------------------------------------------


class HalveLarger:
    """A policy of a user, whose state_dict holds its own list."""

    def __init__(self):
        self.norms = []

    def coefficient(self, norm):
        self.norms.append(norm)
        return 0.5 if norm > min(self.norms) else 1.0

    def state_dict(self):
        return {"norms": self.norms}

    def load_state_dict(self, state_dict):
        self.norms = state_dict["norms"]


def params_to_train(model):
    return [p for p in model.parameters() if p.requires_grad]


def copies_of(model):
    return [p.detach().to(torch.bfloat16) for p in params_to_train(model)]


WITH_TAILS = {
    "clipped, averaged, zeroed": lambda model: onepass.AdamW(
        params_to_train(model), max_norm=0.5, average=AveragedModel(model, decay=0.9), zero_grad=True
    ),
    "ZClip, mean": lambda model: onepass.SGD(
        params_to_train(model), lr=0.01, max_norm=onepass.ZClip(warmup_steps=2), average=AveragedModel(model)
    ),
    "AutoClip, copies": lambda model: onepass.Adafactor(
        params_to_train(model), max_norm=onepass.AutoClip(50.0, history=4), copy_to=copies_of(model)
    ),
    "SkipSpikes in Lookahead": lambda model: onepass.Lookahead(
        onepass.Adam(
            params_to_train(model),
            max_norm=onepass.SkipSpikes(0.1, window=4),
            skip_nonfinite=True,
            average=AveragedModel(model, decay=0.9, warmup=True).double(),
            copy_to=copies_of(model),
            zero_grad=True,
        ),
        k=2,
    ),
    "a user's policy": lambda model: onepass.RMSprop(params_to_train(model), max_norm=HalveLarger(), clip_value=0.1),
}
each_with_tail = pytest.mark.parametrize("make", WITH_TAILS.values(), ids=WITH_TAILS)


def trained_with_tail(make, steps):
    torch.manual_seed(0)
    model = Net()
    model.repeated = torch.ones(1, 8)  # an average cannot write to the expanded one
    optimizer = make(model)
    train(model, optimizer, batches(), steps)
    return model, optimizer, getattr(optimizer, "optimizer", optimizer)._tail


@pytest.mark.parametrize("is_round_open", [False, True])
@pytest.mark.parametrize("steps", [0, 5], ids=["new", "trained"])
@each_with_tail
def test_averages_copies_policies_and_the_last_step_are_as_before(make, steps, is_round_open):
    model, optimizer, tail = trained_with_tail(make, steps)
    average = tail.average
    if not is_round_open and average is not None:
        average.update_parameters(model)
    before, report = everything(model, optimizer), optimizer.last_step
    assert (report is None) == (steps == 0)
    moved = set()

    def loss_fn(output, target):
        copies = [*Slots(tail._copy_slots).held, *([] if average is None else average.parameters())]
        moved.add((*map(bits, copies), str(tail.policy and tail.policy.state_dict())))
        return cross_entropy(output, target)

    lr_find(model, optimizer, loss_fn, batches(), steps=8, start=1e-4, end=0.1, progress=False)
    assert len(moved) > 3
    assert everything(model, optimizer) == before
    assert optimizer.last_step is report


@each_with_tail
def test_averages_and_policies_go_on_as_if_there_had_been_no_test(make):
    ends = []
    for finds in (False, True):
        model, optimizer, tail = trained_with_tail(make, 3)
        if finds:
            with pytest.raises(ArithmeticError):
                lr_find(model, optimizer, Failing(4), batches(), steps=9, progress=False)
            lr_find(model, optimizer, cross_entropy, batches(), steps=9, progress=False)
        train(model, optimizer, batches(), 4)
        copies = Slots(tail._copy_slots).held
        if tail.average is not None:
            tail.average.update_parameters(model)
            copies = [*copies, *tail.average.state_dict().values()]
        policy = None if tail.policy is None else tail.policy.state_dict()
        ends.append(([bits(x) for x in (*model.state_dict().values(), *copies)], policy, optimizer.last_step))
    assert ends[0] == ends[1]


class Failing:
    """A loss that fails at a call."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, output, target):
        self.calls -= 1
        if self.calls == 0:
            raise ArithmeticError
        return cross_entropy(output, target)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["loss", "loader", "step", "first batch"])
def test_an_exception_is_passed_on_when_all_is_as_before(error, where):
    model, optimizer = trained()
    before = everything(model, optimizer)
    calls = []

    def fail_at(k):
        calls.append(0)
        if len(calls) == k:
            raise error("here")

    def loss_fn(output, target):
        if where in ("loss", "first batch"):
            fail_at(6 if where == "loss" else 1)
        return cross_entropy(output, target)

    def loader():
        for batch in batches():
            if where == "loader":
                fail_at(4)
            yield batch

    if where == "step":
        hook = optimizer.register_step_post_hook(lambda *_: fail_at(5))
        before = everything(model, optimizer)
    with pytest.raises(error, match="here"):
        lr_find(model, optimizer, loss_fn, [*batches()] if where != "loader" else loader(), progress=False)
    assert everything(model, optimizer) == before
    if where == "step":
        hook.remove()


def test_ctrl_c_within_the_restoration_waits_for_its_end(monkeypatch):
    model, optimizer = trained()
    before = everything(model, optimizer)
    set_rng_state = torch.set_rng_state

    def interrupted(state):
        set_rng_state(state)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(torch, "set_rng_state", interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for background processes
    try:
        with pytest.raises(KeyboardInterrupt):
            lr_find(model, optimizer, cross_entropy, batches(), steps=4, progress=False)
        assert everything(model, optimizer) == before
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)


def test_memory_that_is_replaced_comes_back():
    """Also a gradient mode, data elsewhere, buffers and modules that come and go, gradients of a model half trained."""
    model, optimizer = trained()
    for p in model.last.parameters():
        p.grad = torch.full_like(p, 7.0)
    model.first.weight.grad = None
    before = everything(model, optimizer)

    def loss_fn(output, target):
        model.first.weight.data = model.first.weight.data.clone().t().contiguous().t() + 1
        model.first.bias.requires_grad_(False)
        model.norm.register_buffer(f"new{model.calls}", torch.zeros(3))
        model.eval()
        optimizer.param_groups[0]["weight_decay"] = 0.3
        return cross_entropy(output, target)

    lr_find(model, optimizer, loss_fn, batches(), steps=4, progress=False)
    assert everything(model, optimizer) == before


def test_gradients_of_others_are_not_added_to():
    """Parameters of the model that this optimizer does not step gather gradients all the while."""
    model, _ = trained()
    optimizer = onepass.AdamW(model.last.parameters())
    before = everything(model, optimizer)
    lr_find(model, optimizer, cross_entropy, batches(), steps=4, progress=False)
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("package", [onepass, torch.optim])
def test_sparse_gradients(package):
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = package.SparseAdam(model.parameters(), lr=0.1)
    options = {"forward": lambda m, rows: m(rows).square().mean(), "steps": 12, "start": 1e-3, "progress": False}
    rows = torch.tensor([1, 3, 3])
    for _ in range(2):
        optimizer.zero_grad()
        model(rows).sum().backward()
        optimizer.step()
    grad, values = model.weight.grad, bits(model.weight.grad.to_dense())
    before = [bits(x) for x in (model.weight, *optimizer.state[model.weight].values()) if isinstance(x, torch.Tensor)]
    found = lr_find(model, optimizer, None, [torch.tensor([0, 3]), torch.tensor([5, 1])], **options)
    assert found.losses[-1] != found.losses[1]
    after = [bits(x) for x in (model.weight, *optimizer.state[model.weight].values()) if isinstance(x, torch.Tensor)]
    assert after == before
    assert model.weight.grad is grad
    assert bits(grad.to_dense()) == values


def test_a_scripted_model():
    plain = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.2)), nn.Linear(8, 3)).eval()
    plain[1][1].train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        model = torch.jit.script(plain)
    optimizer = onepass.AdamW(model.parameters())
    modes = [module.training for module in model.modules()]
    assert True in modes
    assert False in modes
    before = [(x.data_ptr(), bits(x)) for x in model.state_dict().values()]
    found = lr_find(model, optimizer, cross_entropy, batches(), steps=9, start=1e-3, progress=False)
    assert found.losses[-1] != found.losses[5]
    assert [(x.data_ptr(), bits(x)) for x in model.state_dict().values()] == before
    assert [module.training for module in model.modules()] == modes


def test_random_numbers_of_gpus_if_they_are_in_use(monkeypatch):
    put_back = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["first", "second"])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", put_back.append)
    with restored():
        assert put_back == []
    assert put_back == [["first", "second"]]


def test_modes():
    """A model in eval mode is trained in train mode; submodules of one in train mode keep theirs."""
    for mode, inner in ((True, False), (False, True)):
        model, optimizer = trained()
        model.train(mode)
        model.frozen_norm.eval()
        seen = set()

        def loss_fn(output, target, model=model, seen=seen):
            seen.add((model.training, model.dropout.training, model.frozen_norm.training))
            return cross_entropy(output, target)

        lr_find(model, optimizer, loss_fn, batches(), steps=3, progress=False)
        assert seen == {(True, True, inner)}
        assert (model.training, model.dropout.training, model.frozen_norm.training) == (mode, mode, False)


# -- what it suggests ------------------------------------------------------------------------------------------------


def curve(losses, **kwargs):
    """Losses over the rates 1e-6, 1e-5, ..."""
    losses = np.array(losses, dtype=float)
    return LRRangeTest(np.logspace(-6, len(losses) - 7, len(losses)), losses, losses, **kwargs)


def test_suggestions_on_curves_whose_answers_are_known():
    #              1e-6  ...                         1e1  1e2
    found = curve([12.0, 10.0, 9.9, 9.8, 9.0, 5.0, 4.4, 3.9, 9.0])
    assert found.suggestions() == pytest.approx({"steepest": 1e-2, "minimum": 1.0, "valley": 1e-3}, rel=1e-12)
    assert found.suggestion() == found.suggestion("steepest")
    # A leap at the beginning, a longer fall after it: only the valley is not misled.
    found = curve([10.0, 6.0, *np.linspace(9.0, 1.0, 33), 30.0])
    assert found.suggestion("steepest") == pytest.approx(1e-6, rel=1e-12)
    assert found.suggestion("valley") == pytest.approx(found.lrs[34 - 17], rel=1e-12)
    # A steeper fall after the lowest loss is no way to train.
    falling = [10.0, 9.9, 9.5, 8.9, 8.0, 6.0, 5.0, 4.5]
    assert curve([*falling, 100.0, 60.0, 6.0, 5.5]).suggestion("steepest") == pytest.approx(1e-1, rel=1e-12)


def test_the_longest_fall_need_not_be_of_neighbours():
    assert lr_finder._longest_fall(np.array([5.0, 9.0, 4.0, 8.0, 3.0, 7.0, 2.0, 9.0])) == (6, 4)


def test_a_sigmoid_is_steepest_at_its_middle():
    lrs = np.geomspace(1e-5, 1, 101)
    smoothed = 1 / (1 + np.exp(3 * np.log(lrs / lrs[40])))
    smoothed[-1] = 1.0
    assert LRRangeTest(lrs, smoothed, smoothed).suggestion("steepest") == lrs[40]


# -- and where it has nothing to suggest -----------------------------------------------------------------------------


def smoothed_by(losses, smoothing, diverged=False):
    """What lr_find makes of these losses."""
    lrs = np.geomspace(1e-6, 1, len(losses))
    weights = smoothing ** np.subtract.outer(np.arange(len(losses)), np.arange(len(losses))).clip(0) * np.tri(
        len(losses)
    )
    return LRRangeTest(lrs, losses, weights @ losses / weights.sum(1), diverged, smoothing)


KINDS_OF_NOISE = {
    "normal": lambda rng, n: rng.normal(size=n),
    "skewed": lambda rng, n: rng.lognormal(0, 0.5, size=n),
    "uniform": lambda rng, n: rng.uniform(size=n),
    "few batches over and over": lambda rng, n: np.resize(rng.normal(size=7), n),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("steps", [50, 100, 300])
@pytest.mark.parametrize("noise", KINDS_OF_NOISE)
def test_nothing_is_suggested_where_the_fall_is_noise(noise, steps, smoothing):
    """In all but a few of a hundred tests whose losses do not depend on the rate until they diverge."""
    rng = np.random.default_rng(0)
    suggested = 0
    for _ in range(100):
        losses = 2.3 + 0.1 * KINDS_OF_NOISE[noise](rng, steps)
        found = smoothed_by(np.append(losses, [40.0, 400.0]), smoothing, diverged=True)
        suggested += bool(found.suggestions())
        if not found.suggestions():
            assert "the loss fell by" in str(found) or "did not fall" in str(found)
    assert suggested <= 4


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("steps", [50, 100, 300])
@pytest.mark.parametrize("noise", KINDS_OF_NOISE)
def test_a_fall_that_stands_out_of_the_noise_is_suggested(noise, steps, smoothing):
    """A loss that falls to half between two rates, with noise of a twentieth of it, and diverges."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        place = np.linspace(0, 1, steps)
        losses = 2.0 - 1.0 / (1 + np.exp(-(place - 0.5) * 20)) + 0.05 * KINDS_OF_NOISE[noise](rng, steps)
        found = smoothed_by(np.append(losses, [40.0, 400.0]), smoothing, diverged=True)
        assert set(found.suggestions()) == {"steepest", "minimum", "valley"}
        assert 0.3 < np.interp(found.suggestion("valley"), found.lrs, np.linspace(0, 1, steps + 2)) < 1.0


@pytest.mark.parametrize("end", [0.3, 1e-3])
def test_nothing_is_suggested_where_the_loss_was_lowest_at_the_last_rate(end):
    """None of the rates was too large."""
    found = find_on_quadratic(curvature=1.0, end=end)
    assert not found.diverged
    why = f"the loss was lowest at the last rate, {end:.2e}: raise end"
    with pytest.raises(ValueError, match=f"^no learning rate to suggest: {why}$"):
        found.suggestion()
    assert str(found).endswith(f"\n  no suggestion: {why}")
    # If the next loss is not finite, it is known where they are too large.
    falling = curve([10.0, 9.9, 9.5, 8.9, 8.0, 6.0, 5.0, 4.5, math.nan], diverged=True)
    assert falling.suggestion("minimum") == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_first_loss_that_is_not_finite_is_told(bad):
    model, optimizer = trained()
    loss_fn = lambda output, target: cross_entropy(output, target) * bad  # noqa: E731
    found = lr_find(model, optimizer, loss_fn, batches(), progress=False)
    why = f"the loss was {bad} before the first step: look at the data, the model and the loss"
    assert str(found).endswith(f"\n  no suggestion: {why}")


def test_training_on_random_labels_at_rates_that_are_too_small_suggests_nothing():
    torch.manual_seed(3)
    model = nn.Linear(20, 10)
    data = [(torch.randn(8, 20), torch.randint(10, (8,))) for _ in range(100)]
    optimizer = onepass.SGD(model.parameters())
    found = lr_find(model, optimizer, cross_entropy, data, start=1e-9, end=1e-5, progress=False)
    assert found.suggestions() == {}


def test_unsettled_averages_and_losses_that_are_not_finite_suggest_nothing():
    losses = [100.0, 1.0, 10.0, 9.9, 9.0, 5.0, 4.9, 6.0, math.nan]
    assert curve(losses, smoothing=2 / 3).suggestion("steepest") == pytest.approx(1e-2, rel=1e-12)
    assert curve(losses, smoothing=2 / 3).suggestion("minimum") == pytest.approx(1e-1, rel=1e-12)


def test_a_test_too_short_for_its_smoothing_does_not_say_that_the_loss_did_not_fall():
    found = curve([5.0, 4.0, 3.0, 2.0, 1.0], smoothing=0.8)
    why = "5 steps are too few for the smoothing 0.8: the first 4 are left out"
    with pytest.raises(ValueError, match=why):
        found.suggestion()
    assert str(found).endswith(f"\n  no suggestion: {why}")
    assert curve([5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.6], smoothing=0.8).suggestions()


@pytest.mark.parametrize("losses", [[1.0], [1.0, 2.0, 3.0]])
def test_a_loss_that_does_not_fall_suggests_nothing(losses, tmp_path):
    found = curve(losses)
    with pytest.raises(ValueError, match="did not fall"):
        found.suggestion()
    assert found.suggestions() == {}
    assert "no suggestion" in str(found)
    found.plot(path=tmp_path / "a.png")


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'best'"):
        curve([2.0, 1.0]).suggestion("best")


# -- what it tells ---------------------------------------------------------------------------------------------------


def test_table_and_text():
    found = curve([10.0, 9.0, 5.0, 4.5, 20.0], diverged=True)
    head, *rows = found.table().splitlines()
    assert head.split() == ["step", "lr", "loss", "smoothed", "loss"]
    assert [[float(x) for x in row.split()] for row in rows] == [
        [i + 1, found.lrs[i].round(12), x, x] for i, x in enumerate(found.losses)
    ]
    text = str(found)
    assert "5 steps, lr 1.00e-06 to 1.00e-02; there the loss diverged" in text
    for method, lr in found.suggestions().items():
        assert f"{method:8}  {lr:.2e}" in text


def test_plot_shows_curve_and_suggestions(tmp_path):
    found = curve([10.0, 9.0, 5.0, 4.5, 20.0])
    figure = found.plot(path=tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (ax,) = figure.axes
    assert ax.get_xscale() == "log"
    assert ax.get_xlabel() == "learning rate"
    assert ax.get_ylabel() == "training loss"
    raw, smoothed, *marks = ax.lines
    assert (raw.get_ydata() == found.losses).all()
    assert (smoothed.get_xdata() == found.lrs).all()
    assert [float(mark.get_xdata()[0]) for mark in marks] == list(found.suggestions().values())
    assert found.plot(ax=ax) is figure
    with pytest.MonkeyPatch.context() as patch:
        shown = []
        patch.setattr(pyplot, "show", lambda: shown.append(pyplot.gcf()))
        assert found.plot() is shown[0]
        pyplot.close(shown[0])


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'onepass\[plots\]'"):
        curve([10.0, 9.0, 5.0]).plot()


def test_progress_goes_to_standard_error_if_wanted(capsys):
    find_on_quadratic(steps=8, end=0.1)
    assert capsys.readouterr() == ("", "")
    model = Quadratic(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    lr_find(model, optimizer, None, [0], forward=lambda m, b: m(b), steps=8, end=0.1)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(" steps")[0] for line in err.splitlines()] == [f"lr_find: {i} of 8" for i in (2, 4, 6, 8)]


# -- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"start": 0.0}, "lr_find: start and end must satisfy 0 < start < end, got 0.0 and 10.0"),
        ({"start": 1.0, "end": 0.5}, "lr_find: start and end must satisfy 0 < start < end, got 1.0 and 0.5"),
        ({"end": math.inf}, "lr_find: start and end must satisfy 0 < start < end, got 1e-07 and inf"),
        ({"steps": 1}, "lr_find: steps must be >= 2, got 1"),
        ({"ramp": "cosine"}, "lr_find: ramp must be 'exponential' or 'linear', got 'cosine'"),
        ({"smoothing": 1.0}, r"lr_find: smoothing must be in \[0, 1\), got 1.0"),
        ({"diverges_at": 1.0}, "lr_find: diverges_at must be > 1, got 1.0"),
        ({"diverges_at": math.nan}, "lr_find: diverges_at must be > 1, got nan"),
        ({"accumulate": 0}, "lr_find: accumulate must be >= 1, got 0"),
    ],
)
def test_arguments_out_of_their_ranges(kwargs, message):
    with pytest.raises(ValueError, match=message):
        find_on_quadratic(**kwargs)


@pytest.mark.parametrize(("loss_fn", "got"), [(None, "neither"), (cross_entropy, "both")])
def test_the_loss_comes_from_one_of_two(loss_fn, got):
    model, optimizer = trained()
    with pytest.raises(TypeError, match=f"^lr_find: pass exactly one of loss_fn and forward, got {got}$"):
        lr_find(model, optimizer, loss_fn, batches(), forward=None if loss_fn is None else lambda *_: None)


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        ((torch.ones(2, 6), torch.ones(2), torch.ones(2)), "tuple of 3"),
        ([torch.ones(2, 6)], "list of 1"),
        ({"x": torch.ones(2, 6), "y": torch.ones(2)}, "dict of 2"),
        (torch.ones(2, 6), "Tensor of 2"),
        (1.0, "float"),
    ],
)
def test_batches_that_are_no_pairs(batch, what):
    model, optimizer = trained()
    before = everything(model, optimizer)
    text = (
        rf"lr_find: loader must give pairs \(inputs, targets\) for loss_fn, got a {what}: use forward=, which computes"
    )
    with pytest.raises(ValueError, match=f"^{text}"):
        lr_find(model, optimizer, cross_entropy, [batch], progress=False)
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("name", ["loss_fn", "forward"])
@pytest.mark.parametrize(
    ("change", "kind", "what"),
    [
        (lambda loss: loss.item(), TypeError, r"must return the loss as a tensor, got the float \d\.\d+"),
        (lambda loss: (loss, 3), TypeError, r"must return the loss as a tensor, got the tuple \(tensor"),
        (lambda loss: None, TypeError, "must return the loss as a tensor, got the NoneType None"),
        (
            lambda loss: loss + torch.zeros(9),
            ValueError,
            r"must return the loss as one number, got a tensor of shape \[9\]",
        ),
        (
            lambda loss: loss.detach(),
            ValueError,
            "must return a loss that depends on a parameter that requires a gradient, got one",
        ),
    ],
)
def test_losses_that_are_none(name, change, kind, what):
    model, optimizer = trained()
    before = everything(model, optimizer)
    functions = {
        "loss_fn": (lambda output, target: change(cross_entropy(output, target)), None),
        "forward": (None, lambda m, batch: change(cross_entropy(m(batch[0]), batch[1]))),
    }
    loss_fn, forward = functions[name]
    with pytest.raises(kind, match=f"^lr_find: {name} {what}"):
        lr_find(model, optimizer, loss_fn, batches(), forward=forward, progress=False)
    assert everything(model, optimizer) == before


def test_arguments_in_each_others_places():
    model, optimizer = trained()
    text = r"lr_find: model and optimizer must be a torch.nn.Module and an optimizer, got a AdamW and a Net"
    with pytest.raises(TypeError, match=f"^{text}$"):
        lr_find(optimizer, model, cross_entropy, batches())
    with pytest.raises(TypeError, match="got a Net and a generator"):
        lr_find(model, model.parameters(), cross_entropy, batches())
    with pytest.raises(TypeError, match=r"^lr_find: loss_fn must be a function, got the list "):
        lr_find(model, optimizer, batches(), cross_entropy)
    with pytest.raises(TypeError, match=r"^lr_find: loader must give batches, got the function "):
        lr_find(model, optimizer, cross_entropy, cross_entropy)


def test_an_optimizer_of_another_model():
    model, _ = trained()
    _, other = trained()
    text = "lr_find: optimizer must have parameters of model, but has none: it was made for another model"
    with pytest.raises(ValueError, match=f"^{text}$"):
        lr_find(model, other, cross_entropy, batches())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"steps": 10.5}, "steps must be an integer >= 2, got the float 10.5"),
        ({"accumulate": "2"}, "accumulate must be an integer >= 1, got the str '2'"),
        ({"start": "1e-7"}, "start must be a number, got the str '1e-7'"),
        ({"smoothing": None}, "smoothing must be a number, got the NoneType None"),
        ({"diverges_at": "4"}, "diverges_at must be a number, got the str '4'"),
    ],
)
def test_arguments_of_the_wrong_type(arguments, text):
    with pytest.raises(TypeError, match=f"^lr_find: {text}"):
        find_on_quadratic(**arguments)


def test_a_whole_number_of_steps_may_be_a_float():
    assert len(find_on_quadratic(steps=1e1, end=0.1).lrs) == 10


def test_loaders_that_do_not_suffice():
    model, optimizer = trained()
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="lr_find: loader must have a batch, but is empty"):
        lr_find(model, optimizer, cross_entropy, [], progress=False)
    with pytest.raises(ValueError, match="only 5 batches and cannot be restarted"):
        lr_find(model, optimizer, cross_entropy, iter(batches()), progress=False)
    assert everything(model, optimizer) == before


def test_a_group_without_a_learning_rate_and_a_lazy_module():
    model, optimizer = trained()
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="lr_find: group 0 of AdamW must have a learning rate"):
        lr_find(model, optimizer, cross_entropy, batches())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch warn that lazy modules may change
        lazy = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="lr_find: the parameters of model must be initialized, but weight is not"):
        lr_find(lazy, trained()[1], cross_entropy, batches())


# -- the handwritten digits ------------------------------------------------------------------------------------------


def test_a_suggestion_is_a_rate_to_train_with():
    found = lr_find_command.find("adamw", steps=100, seed=0)
    assert found.diverged
    task = digits("adamw", quick=True)

    def loss_after_training(lr):
        torch.manual_seed(0)
        model = task.build()
        optimizer = CLASSES["adamw"][1](model.parameters(), lr=lr, **ARGUMENTS["adamw"])
        generator = torch.Generator().manual_seed(1)
        train(model, optimizer, [task.draw(generator) for _ in range(60)], 60)
        with torch.no_grad():
            inputs, targets = task.held_out
            return cross_entropy(model(inputs), targets).item()

    suggested = {method: loss_after_training(lr) for method, lr in found.suggestions().items()}
    assert set(suggested) == {"steepest", "minimum", "valley"}
    assert all(loss < 0.5 * task.untaught for loss in suggested.values()), suggested
    # Rates far from where the loss falls do not learn: the test tells which do.
    assert loss_after_training(found.lrs[-1]) > 0.9 * task.untaught
    assert loss_after_training(1e-6) > 0.9 * task.untaught


def test_the_command(tmp_path, capsys):
    from onepass.__main__ import main

    assert main(["lr-find", "--steps", "12", "--table", "--png", str(tmp_path / "found.png")]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) >= 12 + 2
    assert "LR range test: 12 steps" in out
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    assert main(["lr-find", "--steps", "1"]) == 2
    assert "steps must be >= 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("nowhere/found.png", "No such file or directory"),
        ("found.foo", "'foo' is not supported"),
        (".", "Is a directory"),
    ],
)
def test_a_picture_that_cannot_be_written_is_told_before_training(file, why, tmp_path, capsys, monkeypatch):
    from onepass.__main__ import main

    monkeypatch.setattr(lr_find_command, "find", None)
    assert main(["lr-find", "--png", str(tmp_path / file)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("onepass lr-find: ")
    assert why in told
    assert list(tmp_path.iterdir()) == []
