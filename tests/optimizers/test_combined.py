"""Combined: what each of its optimizers does, as one; and create("muon", model)."""

import copy
import io
import pickle

import onepass
import pytest
import torch
from reference import bits
from torch import nn
from torch.nn import Parameter


class Net(nn.Module):
    """A small language model, with everything that create("muon") distinguishes."""

    def __init__(self, tied=False):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.places = Parameter(torch.randn(5, 8))
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False))
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x):
        x = self.norm(self.words(x) + self.places)
        return self.head(x + self.inner(self.conv(x.mT).mT))


def loss_of(net, seed):
    torch.manual_seed(seed)
    x = torch.randint(11, (4, 5))
    return nn.functional.cross_entropy(net(x).flatten(0, 1), x.flatten())


def names_of(optimizer):
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def twins(tied=False):
    torch.manual_seed(0)
    net = Net(tied)
    return net, copy.deepcopy(net)


def pair(net, **arguments):
    matrices = [net.inner[0].weight, net.inner[2].weight]
    others = [p for p in net.parameters() if not any(p is q for q in matrices)]
    return [onepass.Muon(matrices, lr=0.02, **arguments), onepass.AdamW(others, lr=0.01, **arguments)]


def test_it_steps_as_its_optimizers_do():
    net, twin = twins()
    combined, parts = onepass.Combined(pair(net)), pair(twin)
    for step in range(4):
        loss = combined.step(lambda step=step: (combined.zero_grad(), loss_of(net, step), net.zero_grad())[1])
        assert loss.ndim == 0
        loss_of(net, step).backward()
        loss_of(twin, step).backward()
        combined.step()
        for part in parts:
            part.step()
        combined.zero_grad()
        assert all(p.grad is None for p in net.parameters())
        for part in parts:
            part.zero_grad()
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert bits(p) == bits(q)


def test_checkpoints():
    """One state_dict of torch's form; resumed to the bit; all groups or none are loaded."""
    net, twin = twins()
    combined = onepass.Combined(pair(net))
    for step in range(2):
        loss_of(net, step).backward()
        combined.step()
        combined.zero_grad()
    file = io.BytesIO()
    torch.save(combined.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], list(range(2, 10))]
    assert saved["state"].keys() == set(range(10))
    assert saved["state"][0].keys() == {"momentum_buffer"}
    twin.load_state_dict(net.state_dict())
    resumed = onepass.Combined(pair(twin))
    resumed.load_state_dict(saved)
    for clone in (resumed, pickle.loads(pickle.dumps(combined)), copy.deepcopy(combined)):
        assert str(clone.state_dict()) == str(combined.state_dict())
        assert [type(part) for part in clone.optimizers] == [onepass.Muon, onepass.AdamW]
    for step in (2, 3):
        for each, optimizer in ((net, combined), (twin, resumed)):
            loss_of(each, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert bits(p) == bits(q)
    wrong = copy.deepcopy(saved)
    wrong["param_groups"][0]["lr"] = 0.875
    wrong["param_groups"][1]["stochastic_rounding"] = "x"
    before = str(resumed.state_dict())
    with pytest.raises(TypeError):
        resumed.load_state_dict(wrong)
    assert str(resumed.state_dict()) == before
    other = onepass.Combined([onepass.SGD([Parameter(torch.ones(2))], momentum=0.9)])
    with pytest.raises(ValueError, match="other parameter groups"):
        other.load_state_dict(saved)
    assert not other.state


def test_a_part_that_fails_after_it_has_loaded():
    """It is set back, too, and not only those before it."""
    p, q = (Parameter(torch.ones(2, 2)) for _ in range(2))
    combined = onepass.Combined([onepass.Muon([p]), torch.optim.SGD([q], momentum=0.9)])
    for each in (p, q):
        each.grad = torch.ones_like(each)
    combined.step()
    before = str(combined.state_dict())
    saved = copy.deepcopy(combined.state_dict())
    for group in saved["param_groups"]:
        group["lr"] = 0.875
    saved["state"][1]["momentum_buffer"] = torch.zeros(2, 2)

    def refuse(optimizer):
        if optimizer.param_groups[0]["lr"] == 0.875:
            raise ValueError("refused")

    combined.optimizers[1].register_load_state_dict_post_hook(refuse)
    with pytest.raises(ValueError, match="refused"):
        combined.load_state_dict(saved)
    assert str(combined.state_dict()) == before


@pytest.mark.parametrize("wrap", [lambda o: onepass.Lookahead(o, k=2), lambda o: onepass.SAM(o, rho=0.0)])
@pytest.mark.parametrize("master", [None, "split", "float32"])
def test_within_wrappers(wrap, master):
    """Also where Lookahead's slow weights are those of masters."""
    net, twin = twins()

    def of(model):
        if master is None:
            return pair(model)
        params = [*model.bfloat16().parameters()]
        return [onepass.SGD(params[:4], lr=1e-3, master=master), onepass.AdamW(params[4:], lr=1e-4, master=master)]

    whole = wrap(onepass.Combined(of(net)))
    parts = [wrap(part) for part in of(twin)]
    for step in range(4):
        loss_of(net, step).backward()
        loss_of(twin, step).backward()
        for optimizer in (whole, *parts):
            if isinstance(optimizer, onepass.SAM):
                optimizer.first_step()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert bits(p) == bits(q)
    assert len(whole.state) == 10


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("torchs", [False, True])
def test_with_a_scaler(bad, torchs):
    net, twin = twins()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    parts = pair(net)
    if torchs:
        parts[1] = torch.optim.AdamW(parts[1].param_groups[0]["params"], lr=0.01)
    combined = onepass.Combined(parts)
    scaler.scale(loss_of(net, 0)).backward()
    if bad:
        net.head.weight.grad[0, 0] = float("inf")
    before = [bits(p) for p in net.parameters()]
    scaler.step(combined)
    scaler.update()
    assert scaler.get_scale() == (128.0 if bad else 256.0)
    if bad:
        assert [bits(p) for p in net.parameters()] == before
        return
    loss_of(twin, 0).backward()
    for part in pair(twin):
        part.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_as_an_optimizer():
    """Schedulers, states, hooks, explain, and what it refuses."""
    net, _ = twins()
    combined = onepass.Combined(pair(net))
    scheduler = onepass.ScheduleLR(combined, "linear(4, end=0)")
    called = []
    combined.register_step_post_hook(lambda *_: called.append(True))
    assert not combined.state
    assert net.places not in combined.state
    assert combined.state.get(net.places) is None
    loss_of(net, 0).backward()
    combined.step()
    scheduler.step()
    assert called == [True]
    assert [group["lr"] for group in combined.param_groups] == pytest.approx([0.015, 0.0075])
    assert combined.state[net.places] is combined.optimizers[1].state[net.places]
    assert set(combined.state) == set(net.parameters())
    combined.state[net.places] = {}
    assert combined.optimizers[1].state[net.places] == {}
    del combined.state[net.places]
    assert len(combined.state) == 9
    with pytest.raises(KeyError):
        combined.state[Parameter(torch.ones(1))]
    rows = onepass.explain(combined)
    assert [(row.group, row.path) for row in rows] == [(0, "kernel")] * 2 + [(1, "kernel")] * 8
    added = Parameter(torch.ones(1))
    onepass.SAM(combined).add_param_group({"params": (p for p in [added]), "lr": 0.5})
    assert combined.optimizers[1].param_groups[-1]["params"] == [added]
    assert combined.param_groups[-1]["sam"] is combined.param_groups[0]["sam"]
    with pytest.raises(ValueError, match="more than one parameter group"):
        combined.add_param_group({"params": [net.inner[0].weight]})
    assert len(combined.param_groups) == 3
    assert combined.last_step is None
    with pytest.raises(TypeError, match="Combined"):
        onepass.step_in_backward(combined)


def test_errors():
    p = Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="Combined: optimizers must have at least one"):
        onepass.Combined([])
    with pytest.raises(TypeError, match=r"Combined: optimizers\[1\] must be a torch.optim.Optimizer, got the int 3"):
        onepass.Combined([onepass.SGD([p]), 3])
    for single in (onepass.SGD([p]), 3):
        with pytest.raises(TypeError, match="Combined: optimizers must be a list of optimizers, got the "):
            onepass.Combined(single)
    for needs in (onepass.SAM(onepass.SGD([p])), onepass.LBFGS([p]), torch.optim.LBFGS([p])):
        with pytest.raises(TypeError, match=f"whose step needs no closure, got {type(needs).__name__}$"):
            onepass.Combined([needs])
    for part in (onepass.SGD([p], skip_nonfinite=True), onepass.SGD([p], copy_to=[torch.ones(2, 2)])):
        with pytest.raises(ValueError, match="Wrap the SGD itself"):
            onepass.Lookahead(onepass.Combined([part]))
    with pytest.raises(ValueError, match="Combined: two of the optimizers have a parameter in common"):
        onepass.Combined([onepass.SGD([p]), onepass.Muon([p])])


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ([Parameter(torch.ones(2))], TypeError, "param_group must be a dict, but got <class 'list'>"),
        ({"params": {Parameter(torch.ones(2))}}, TypeError, "need to be organized in ordered collections"),
        ({"params": nn.Linear(2, 2)}, TypeError, r"Combined: group 2: params must be .*: pass its parameters\(\)"),
        ({"params": [Parameter(torch.ones(2))], "lr": "1"}, TypeError, "SGD: group 1: lr must be a number"),
    ],
)
def test_groups_that_are_refused(group, error, message):
    p, q = (Parameter(torch.ones(2, 2)) for _ in range(2))
    combined = onepass.Combined([onepass.Muon([p]), onepass.SGD([q])])
    with pytest.raises(error, match=message):
        combined.add_param_group(group)
    assert len(combined.param_groups) == 2


def test_a_generator_in_a_group_is_not_lost():
    p, q = (Parameter(torch.ones(2, 2)) for _ in range(2))
    combined = onepass.Combined([onepass.Muon([p]), onepass.SGD([q])])
    group = {"params": (each for each in [p])}
    for _ in range(2):
        with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
            combined.add_param_group(group)
    new = Parameter(torch.ones(2))
    combined.add_param_group({"params": (each for each in [new])})
    assert combined.param_groups[2]["params"] == [new]


def test_create_muon():
    net, _ = twins()
    optimizer = onepass.create("muon", net, lr=0.01, momentum=0.9, no_muon=["pla*"], adamw={"betas": (0.8, 0.9)})
    muon, adamw = optimizer.optimizers
    assert type(muon) is onepass.Muon
    assert type(adamw) is onepass.AdamW
    assert names_of(muon) == ["inner.0.weight", "inner.2.weight"]
    assert set(names_of(adamw)) == {name for name, _ in net.named_parameters()} - set(names_of(muon))
    defaults = muon.defaults
    assert (defaults["lr"], defaults["momentum"], defaults["adjust_lr_fn"]) == (0.01, 0.9, "match_rms_adamw")
    assert (adamw.defaults["lr"], adamw.defaults["betas"], adamw.defaults["eps"]) == (0.01, (0.8, 0.9), 1e-8)
    assert muon.defaults["weight_decay"] == adamw.defaults["weight_decay"] == 0.1
    before = loss_of(net, 0).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(net, 0).backward()
        optimizer.step()
    assert loss_of(net, 0).item() < 0.5 * before


class Asked(nn.Sequential):
    """A model that names its head, as those of transformers and timm do."""

    def get_classifier(self):
        return self[0]


class Distilled(Asked):
    """Two heads."""

    def get_classifier(self):
        return self[0], self[2]


class Headless(Asked):
    """As timm's models without a head of their own."""

    def get_classifier(self):
        return nn.Identity()


@pytest.mark.parametrize(
    ("model", "matrices"),
    [
        (Distilled(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 5)), ["1.weight"]),
        (Headless(nn.Linear(3, 4), nn.Linear(4, 5)), ["0.weight"]),
        (nn.DataParallel(Asked(nn.Linear(3, 4), nn.Linear(4, 5))), ["module.1.weight"]),
        (Net(), ["places", "inner.0.weight", "inner.2.weight"]),  # a plain parameter is no embedding by its type
        (Net(tied=True), ["places", "inner.0.weight", "inner.2.weight"]),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), ["0.weight"]),
        (Asked(nn.Linear(3, 4), nn.Linear(4, 5)), ["1.weight"]),
        (nn.LSTM(3, 4), ["weight_ih_l0", "weight_hh_l0"]),
        (nn.Linear(3, 4), []),
        (nn.Conv2d(3, 4, 3), []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_which_matrices_muon_steps(model, matrices):
    optimizer = onepass.create("muon", model)
    assert sorted(names_of(optimizer)) == sorted(name for name, _ in model.named_parameters())
    found = [name for part in optimizer.optimizers if isinstance(part, onepass.Muon) for name in names_of(part)]
    assert found == matrices


def test_create_muon_with_groups():
    net, _ = twins()
    optimizer = onepass.create(
        "muon", net, lr=0.1, weight_decay=0.2, no_decay=["norm", "bias"], lr_scale={"inner.*": 0.5}
    )
    told = [
        (type(part).__name__, group["lr"], group["weight_decay"], group["param_names"])
        for part in optimizer.optimizers
        for group in part.param_groups
    ]
    assert told == [
        ("Muon", 0.1, 0.2, ["places"]),
        ("Muon", 0.05, 0.2, ["inner.0.weight", "inner.2.weight"]),
        ("AdamW", 0.1, 0.2, ["words.weight", "conv.weight", "head.weight"]),
        ("AdamW", 0.1, 0.0, ["norm.weight", "norm.bias", "conv.bias"]),
        ("AdamW", 0.05, 0.0, ["inner.0.bias"]),
    ]


def test_create_normuon():
    """As Muon's, with its own arguments."""
    net = Net()
    optimizer = onepass.create("normuon", net, lr=0.01, beta2=0.9)
    assert [type(part) for part in optimizer.optimizers] == [onepass.NorMuon, onepass.AdamW]
    muons = onepass.create("muon", net, lr=0.01)
    assert [names_of(part) for part in optimizer.optimizers] == [names_of(part) for part in muons.optimizers]
    assert optimizer.optimizers[0].defaults["beta2"] == 0.9
    with pytest.raises(ValueError, match="max_norm needs all parameters together, but NorMuon and AdamW"):
        onepass.create("normuon", net, max_norm=1.0)


def test_create_muon_takes_defaults():
    """A configuration that names each argument is that of every class."""
    net, twin = twins()
    defaults = {"max_norm": None, "average": None, "copy_to": None, "skip_nonfinite": False, "zero_grad": False}
    given, plain = onepass.create("muon", net, **defaults), onepass.create("muon", twin)
    assert str(given.state_dict()) == str(plain.state_dict())
    with pytest.raises(ValueError, match="create: max_norm needs all parameters together"):
        onepass.create("muon", net, max_norm=0.0)


def test_create_muon_reads_an_iterator_of_patterns_once():
    net, _ = twins()
    roles = ["bias", "norm", "embedding"]
    listed, iterated = (onepass.create("muon", net, no_decay=each) for each in (roles, iter(roles)))
    assert str(iterated.state_dict()) == str(listed.state_dict())


def test_create_muon_refuses():
    net, _ = twins()
    for name, value in {"max_norm": 1.0, "skip_nonfinite": True, "copy_to": net}.items():
        with pytest.raises(ValueError, match=f"create: {name} needs all parameters together"):
            onepass.create("muon", net, **{name: value})
    with pytest.raises(ValueError, match=r"^create: no_muon: no parameter has a name like 'x'"):
        onepass.create("muon", net, no_muon=["x"])
    with pytest.raises(ValueError, match=r"^create: no_muon must be a list of patterns .*: pass \['pla\*'\]$"):
        onepass.create("muon", net, no_muon="pla*")
    for no_muon in (None, 3, [3]):
        with pytest.raises(TypeError, match=r"^create: no_muon must be a list of patterns of names, got the"):
            onepass.create("muon", net, no_muon=no_muon)
    for adamw in (None, [1], "lr"):
        with pytest.raises(TypeError, match=r"^create: adamw must be a dict of arguments of AdamW, got the"):
            onepass.create("muon", net, adamw=adamw)
    for module in (net, nn.LayerNorm(3)):  # which has no matrices
        with pytest.raises(TypeError, match=r"^create: Muon has no argument 'betas'$"):
            onepass.create("muon", module, betas=(0.9, 0.99))  # AdamW's go into adamw
    with pytest.raises(ValueError, match="empty parameter list"):
        onepass.create("muon", nn.ReLU())
    assert isinstance(onepass.create("muon", [net.head.weight]), onepass.Muon)


def test_steps_that_all_parts_skip_are_not_counted():
    first, second = (Parameter(torch.ones(4)) for _ in range(2))
    optimizer = onepass.Combined(
        [onepass.AdamW([first], skip_nonfinite=True), onepass.SGD([second], lr=0.1, skip_nonfinite=True)]
    )
    scheduler = onepass.ScheduleLR(optimizer, "warmup(5)", count_skipped=False)
    for bad, counted in (((first, second), 0), ((first,), 1), ((), 2), ((first, second), 2)):
        for p in (first, second):
            p.grad = torch.full((4,), float("nan") if any(p is q for q in bad) else 1.0)
        optimizer.step()
        scheduler.step()
        assert scheduler.last_epoch == counted
