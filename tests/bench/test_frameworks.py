"""bench/frameworks.py, on loops that need no framework: what is timed, what is refused, what is missing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import frameworks
import onepass
import pytest
import torch
from frameworks import Framework, Watch
from torch import nn

BENCH = Path(frameworks.__file__).parent
PAUSE = 0.005

pytestmark = pytest.mark.usefixtures("one_thread")


def loop(make, steps, watch, closures=False):
    """A framework's loop, in short. What surrounds the optimizer's step takes at least PAUSE."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2))
    optimizer = watch.put_on(make(net.parameters()))

    def closure():
        time.sleep(PAUSE)
        optimizer.zero_grad()
        loss = net(torch.randn(3, 4)).square().sum()
        loss.backward()
        watch.losses.append(loss.item())
        return loss

    for _ in range(steps):
        if closures:
            assert optimizer.step(closure).item() == watch.losses[-1]
        else:
            closure()
            optimizer.step()


def with_closures(make, steps, watch):
    loop(make, steps, watch, closures=True)


LOOPS = {"a loop": Framework(loop, ("torch",)), "with closures": Framework(with_closures, ("torch.nn", "torch"))}


@pytest.fixture(autouse=True)
def loops(monkeypatch):
    monkeypatch.setattr(frameworks, "FRAMEWORKS", LOOPS)
    monkeypatch.setattr(frameworks, "import_torchvision", lambda: None)  # nobody here needs it


@pytest.fixture
def nothing_timed(monkeypatch):
    monkeypatch.setattr(frameworks, "sample_in_turn", lambda *args: pytest.fail("it was timed"))


def test_every_framework_is_measured():
    results = list(frameworks.measure(quick=True, rounds=2))
    wanted = [f"frameworks: {name}, {what}" for name in LOOPS for what in ("whole step", "optimizer's part")]
    assert [r.workload for r in results] == wanted
    for r in results:
        assert (r.optimizer, r.elements, r.tensors) == ("AdamW", 58, 4)
        assert list(r.samples) == ["onepass", "default", "fused"]


def test_an_optimizers_part_is_a_part_without_the_closure():
    whole_a, part_a, whole_b, part_b = frameworks.measure(quick=True, rounds=2)
    for whole, part in ((whole_a, part_a), (whole_b, part_b)):
        for contender in whole.samples:
            assert len(whole.samples[contender]) == len(part.samples[contender]) == 2
            for w, p in zip(whole.samples[contender], part.samples[contender], strict=True):
                assert 0 < p <= w - PAUSE


def test_every_contender_is_stepped_by_its_own_class(monkeypatch):
    seen = []
    monkeypatch.setattr(frameworks.Watch, "put_on", lambda self, optimizer: seen.append(optimizer) or 1 / 0)
    for contender in frameworks.CONTENDERS:
        with pytest.raises(ZeroDivisionError):
            frameworks.train(loop, contender, 8)
    assert [type(optimizer) for optimizer in seen] == [onepass.AdamW, torch.optim.AdamW, torch.optim.AdamW]
    assert [bool(optimizer.defaults["fused"]) for optimizer in seen] == [False, False, True]


# ---- Nothing that is wrong is timed ----


def adamw(**options):
    return lambda params: onepass.AdamW(params, **{"lr": 1e-3, "eps": 1e-6, **options})


@pytest.mark.parametrize("options", [{"lr": 1.001e-3}, {"weight_decay": 0.0}, {"betas": (0.9, 0.99)}])
@pytest.mark.parametrize("contender", ["onepass", "fused"])
def test_a_wrong_optimizer_is_refused(monkeypatch, nothing_timed, contender, options):
    monkeypatch.setitem(frameworks.CONTENDERS, contender, adamw(**options))
    with pytest.raises(AssertionError, match=f"a loop: {contender}: .* elements differ"):
        next(frameworks.measure(quick=True, rounds=1))


def test_an_optimizer_that_goes_wrong_in_a_later_round_is_refused(monkeypatch):
    rates = iter([1e-3, 1e-3, 2e-3])
    monkeypatch.setitem(frameworks.CONTENDERS, "onepass", lambda params: adamw(lr=next(rates))(params))
    with pytest.raises(AssertionError, match="a loop: onepass: losses: 7 of 8 elements differ"):
        next(frameworks.measure(quick=True, rounds=2))
    assert list(rates) == []


def test_runs_that_cannot_be_repeated_are_refused(monkeypatch, nothing_timed):
    def unseeded(make, steps, watch):
        torch.seed()
        loop(make, steps, watch)

    monkeypatch.setattr(frameworks, "CONTENDERS", {"default": frameworks.CONTENDERS["default"]})
    with pytest.raises(AssertionError, match="x: default: losses: 8 of 8 elements differ"):
        frameworks.compare("x", unseeded, 8, 1)


def watched(losses=(1.0, 2.0), param=1.0):
    watch = Watch()
    watch.losses, watch.seconds, watch.params = list(losses), [1e-3, 1e-3], [torch.full((5,), param)]
    return watch


def test_losses_and_parameters_are_compared():
    watched().agree("x", watched(param=1 + 3e-7), 2)
    with pytest.raises(AssertionError, match="x: losses: 1 of 2 elements differ"):
        watched().agree("x", watched(losses=(1.0, 2.00001)), 2)
    with pytest.raises(AssertionError, match="x: losses: 1 of 2 elements differ"):
        watched(losses=(1.0, float("nan"))).agree("x", watched(), 2)
    with pytest.raises(AssertionError, match="x: parameters: 5 of 5 elements differ"):
        watched().agree("x", watched(param=1.00001), 2)


@pytest.mark.parametrize("losses", [(), (1.0,), (1.0, 2.0, 3.0)])
def test_a_loss_for_every_step_is_compared(losses):
    for pair in ((watched(losses), watched()), (watched(), watched(losses)), (watched(losses), watched(losses))):
        with pytest.raises(AssertionError, match=r"x: 2 steps, \d losses, \d to compare with, of 2"):
            pair[0].agree("x", pair[1], 2)


# ---- What is not installed ----


def test_what_is_missing_is_told_and_the_rest_is_measured(monkeypatch, tmp_path):
    (tmp_path / "broken_framework.py").write_text(
        "print('hello')\nraise RuntimeError('built for another torch\\nat x')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = {
        "absent": Framework(loop, ("torch", "no_such_framework")),
        "broken": Framework(loop, ("broken_framework",)),
        "a loop": LOOPS["a loop"],
    }
    monkeypatch.setattr(frameworks, "FRAMEWORKS", found)
    absent, broken, *results = frameworks.measure(quick=True, rounds=1)
    assert absent == "absent is not measured: ModuleNotFoundError: No module named 'no_such_framework'"
    assert broken == "broken is not measured: RuntimeError: built for another torch"
    assert len(results) == 2
    assert frameworks.versions() == {"torch": torch.__version__}


def test_an_error_within_a_framework_is_no_missing_framework(monkeypatch):
    def fails(make, steps, watch):
        raise ImportError("in the midst of training")

    monkeypatch.setattr(frameworks, "FRAMEWORKS", {"fails": Framework(fails, ("torch",))})
    with pytest.raises(ImportError, match="in the midst"):
        next(frameworks.measure(quick=True, rounds=1))


TORCHVISION = """
import torch

@torch.library.register_fake("torchvision::nms")
def described(dets, scores, iou_threshold):
    return dets.new_empty(0)
"""


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (TORCHVISION, "imported"),
        ("raise RuntimeError('broken otherwise')", "RuntimeError: broken otherwise"),
        ("raise ImportError('no such thing')", "ImportError: no such thing"),
    ],
)
def test_a_torchvision_without_its_operators_is_imported(tmp_path, source, told):
    """In a process of its own, as what is declared stays."""
    (tmp_path / "torchvision.py").write_text(source)
    code = "import torchvision_on_cpu; print(torchvision_on_cpu.import_torchvision().__name__, 'imported')"
    path = os.pathsep.join([str(tmp_path), str(BENCH), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert told in (done.stdout if done.returncode == 0 else done.stderr)
    assert (done.returncode == 0) == (told == "imported")
