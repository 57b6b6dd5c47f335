"""bench/peers.py: what it offers computes what onepass computes, and what it does not offer is named.

Which peers are installed differs from machine to machine (CI has none); every test says something about both.
"""

import functools
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import onepass
import pytest
import torch
from onepass.cli import bench, timing
from torch._dynamo.utils import counters

SCRIPT = Path(__file__).parents[2] / "bench" / "peers.py"

pytestmark = pytest.mark.usefixtures("one_thread")


def load():
    spec = importlib.util.spec_from_file_location("bench_peers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


peers = load()

SUBJECTS = {subject.name: subject for subject in bench.SUBJECTS}
SUBJECTS["Adafactor"] = bench.Subject(onepass.Adafactor, {}, tolerance=2e-4)  # as in bench/large.py
SUBJECTS["CAME"] = bench.Subject(onepass.CAME, {"lr": 1e-2}, tolerance=2e-4)

SHAPES = {"small": [(64, 48), (5,), (3, 4, 5), (1,)], "large": [(300, 200), (40_003,)]}  # on both sides of SMALL

# Far from all defaults: an argument that a peer reads in another way, or not at all, shows.
OTHERWISE = {
    "lr": 3e-3,
    "betas": (0.8, 0.95),
    "eps": 1e-2,
    "weight_decay": 0.1,
    "momentum": 0.7,
    "dampening": 0.3,
    "rho": 0.8,
    "clip_threshold": 0.5,
    "alpha": 0.9,
    "trust_clip": True,
    "nesterov": True,
    "no_prox": True,
    "gamma": 0.1,
    "grad_averaging": True,
    "d0": 1e-3,
    "growth_rate": 1.5,
    "use_bias_correction": True,
    "momentum_decay": 0.1,
    "warmup_steps": 5,
    "r": 0.5,
    "weight_lr_power": 1.0,
}

PAIRS = [(peer, optimizer) for peer, formulas in peers.FORMULAS.items() for optimizer in formulas]


@pytest.fixture
def untried(monkeypatch):
    """What was found out about peers so far is forgotten, and so is what the test finds out."""
    monkeypatch.setattr(peers, "_failures", {})
    monkeypatch.setattr(peers, "_trial", functools.cache(peers._trial.__wrapped__))


def installed(package):
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def assert_same(subject, name, maker, shapes):
    grads = timing.gradients(shapes)
    kept = [g.clone() for g in grads]
    ours, theirs = timing.parameters(kept), timing.parameters(grads)
    step, run = subject.ours(ours, **subject.arguments).step, maker(theirs)
    for k in range(1, 11):
        step()
        run()
        if k in (3, 10):  # from the sixth step on, RAdam trusts its variance
            subject.check(name, ours, theirs)
    assert all(map(torch.equal, grads, kept)), f"{name} writes to the gradients"


@pytest.mark.parametrize(("peer", "optimizer"), PAIRS)
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("values", ["of the benchmark", "otherwise"])
def test_an_installed_peer_agrees_and_another_is_named(peer, optimizer, size, values):
    subject = SUBJECTS[optimizer]
    if values == "otherwise":
        formula = peers.FORMULAS[peer][optimizer]
        arguments = {name: OTHERWISE[name] for name in formula.passes.split()} | (formula.only or {})
        if optimizer in ("Adan", "AdEMAMix"):
            arguments["betas"] = (0.8, 0.95, 0.99)
        subject = subject._replace(arguments=arguments)
    found = peers.every(optimizer, subject.arguments)
    package, _ = peers.PACKAGES[peer]
    if installed(package):
        assert peer not in peers.missing()
        assert peers.versions()[peer] == importlib.metadata.version(package)
        assert_same(subject, peer, found[peer], SHAPES[size])
    else:
        assert peer not in found
        assert peer not in peers.versions()
        assert peers.missing()[peer] == f"not installed: pip install {package}"


@pytest.mark.parametrize("peer", peers.PACKAGES)
def test_every_peer_has_a_formula_that_the_benchmark_measures(peer):
    assert any(
        peers._options(formula, optimizer, SUBJECTS[optimizer].arguments) is not None
        for optimizer, formula in peers.FORMULAS[peer].items()
    )


@pytest.mark.parametrize(
    ("peer", "optimizer", "arguments"),
    [
        ("bitsandbytes", "SGD", {"lr": 0.1}),  # it has none without momentum
        ("bitsandbytes", "Adam", {"weight_decay": 0.1}),  # would be AdamW's
        ("optimi", "Adam", {"weight_decay": 0.1}),  # would be written to the gradients
        ("pytorch_optimizer", "SGD", {"momentum": 0.9, "nesterov": True}),
        ("DeepSpeed", "AdamW", {"amsgrad": True}),
        ("DeepSpeed", "Lion", {"state_dtype": torch.bfloat16}),
        ("pytorch_optimizer", "Adafactor", {"lr": 1e-3}),
        ("schedulefree", "ScheduleFreeSGD", {"weight_decay": 0.1}),  # would be written to the gradients
        ("heavyball", "NAdam", {"lr": 1e-3}),  # another use of eps
    ],
)
def test_arguments_that_make_it_another_formula_make_it_no_peer(peer, optimizer, arguments):
    assert peers._options(peers.FORMULAS[peer][optimizer], optimizer, arguments) is None
    assert peer not in peers.every(optimizer, arguments)


@pytest.mark.parametrize("peer", peers.PACKAGES)
def test_a_peer_that_is_not_there_is_named(peer, monkeypatch, untried):
    package, module = peers.PACKAGES[peer]
    root = module.partition(".")[0]

    class Nowhere:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == root:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Nowhere, *sys.meta_path])
    for name in (root, module):
        monkeypatch.delitem(sys.modules, name, raising=False)
    optimizer = next(iter(peers.FORMULAS[peer]))
    assert peer not in peers.every(optimizer, SUBJECTS[optimizer].arguments)
    assert peers.missing()[peer] == f"not installed: pip install {package}"
    assert peer not in peers.versions()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("raise OSError('no such library')", "cannot be imported: OSError: no such library"),
        ("import no_such_module", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_peer_that_breaks_when_it_is_imported_is_named(content, told, tmp_path, monkeypatch, untried):
    (tmp_path / "lion_pytorch.py").write_text(content)
    monkeypatch.delitem(sys.modules, "lion_pytorch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert "lion-pytorch" not in peers.makers("Lion", {})
    assert peers.missing()["lion-pytorch"] == told


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (
            "raise RuntimeError('no compiler\\nhere') from OSError('ninja')",
            "RuntimeError: no compiler (OSError: ninja)",
        ),
        ("pass", "ArithmeticError: a step against the gradient left a parameter where it was"),
    ],
)
def test_a_peer_that_cannot_step_is_named(step, told, tmp_path, monkeypatch, untried):
    (tmp_path / "broken_peer.py").write_text(
        "import torch\n\n\nclass Adam(torch.optim.Adam):\n    def step(self, closure=None):\n        " + step + "\n"
    )
    monkeypatch.delitem(sys.modules, "broken_peer", raising=False)  # the one of the other case
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(peers.PACKAGES, "broken", ("broken-peer", "broken_peer"))
    monkeypatch.setitem(peers.FORMULAS, "broken", {"Adam": peers.Formula("broken_peer:Adam", "lr")})
    assert "broken" not in peers.makers("Adam", {"lr": 1e-3})
    assert peers.missing()["broken Adam"] == f"cannot make a step on this machine: {told}"


def test_a_peer_is_tried_in_silence(tmp_path, monkeypatch, untried, capfd):
    (tmp_path / "noisy_peer.py").write_text(
        "import logging, sys, warnings\nfrom torch.optim import Adam\n"
        "print('noise')\nprint('noise', file=sys.stderr)\nwarnings.warn('noise')\nlogging.warning('noise')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(peers.PACKAGES, "noisy", ("noisy-peer", "noisy_peer"))
    monkeypatch.setitem(peers.FORMULAS, "noisy", {"Adam": peers.Formula("noisy_peer:Adam", "lr")})
    assert "noisy" in peers.makers("Adam", {"lr": 1e-3})
    assert capfd.readouterr() == ("", "")


def test_what_torch_does_not_compile_is_not_offered():
    for optimizer, subject in SUBJECTS.items():
        assert ("compiled" in peers.compiled(optimizer, subject.arguments)) is (optimizer in peers.COMPILABLE)


def test_torchs_step_compiled_agrees_and_compiles_no_more(capfd):
    """Of one class, as each takes half a minute; the benchmark itself compares them all before it times them."""
    subject = SUBJECTS["AdamW"]
    found = peers.compiled("AdamW", subject.arguments)
    shapes = [(64, 48), (5,)]
    assert_same(subject, "compiled", found["compiled"], shapes)
    rate = torch.tensor(1e-3)
    found = peers.compiled("AdamW", subject.arguments | {"lr": rate})
    run = found["compiled"](timing.parameters(timing.gradients(shapes)))
    counters.clear()
    for _ in range(3):
        run()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0, "nothing was compiled"
    for scheduled in (5e-4, 4e-4, 3e-4):
        rate.fill_(scheduled)
        run()
    assert counters["stats"]["unique_graphs"] == graphs
    assert capfd.readouterr() == ("", "")
