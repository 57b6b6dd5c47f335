"""bench/tail.py, clip.py, training.py, sharded.py, surroundings.py: what they measure; nothing wrong is timed."""

import importlib.util
import sys
from pathlib import Path

import onepass
import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"

pytestmark = pytest.mark.usefixtures("one_thread")

TAIL_SIZES = ("16 x 4M", "1000 x 100")
TORCH_FORMS = ["onepass", "fused", "default"]
TAIL = {
    "whole": TORCH_FORMS,
    "whole, bfloat16 copy, zeroed in place": TORCH_FORMS,
    "step with max_norm": ["with max_norm", "bare"],
    "step with average": ["with average", "bare"],
    "unscale_": ["torch"],
    "clip_grad_norm_": ["torch"],
    "average": ["torch"],
    "bfloat16 copy": ["torch"],
    "zero_grad in place": ["torch"],
    "zero_grad": ["torch"],
}
MODELS = {"digits net": "AdamW", "character transformer": "AdamW", "RL policy": "AdamW", "wide embedding": "SparseAdam"}
SCHEDULERS = [
    *("StepLR", "CosineAnnealingLR", "OneCycleLR", "LambdaLR", "ReduceLROnPlateau", "SequentialLR"),
    "ScheduleLR",
]
LOGGED = ["digits net", "MLP", "1000 x 100", "one of 4M"]


@pytest.fixture
def script(monkeypatch):
    """Imports a file of bench/ by its name."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def measured(module):
    """What is measured: contenders by workload, each with one time that is above zero."""
    found = {}
    for result in module.measure(quick=True, rounds=1):
        assert result.workload not in found
        assert all(len(samples) == 1 and samples[0] > 0 for samples in result.samples.values())
        found[result.workload] = list(result.samples)
    return found


def test_tails(script):
    tail = script("tail")
    assert measured(tail) == {f"tail: {part}, {size}": names for size in TAIL_SIZES for part, names in TAIL.items()}


def test_clipping_in_place(script):
    found = measured(script("clip"))
    sizes = ("16 x 4M", "1 x 16M", "200 x 1000", "1000 x 100")
    assert found == {
        f"clip: {case}, {size} {dtype}, {state}": ["onepass", "torch"]
        for case in ("norm above", "norm below", "value")
        for size in sizes
        for dtype in ("float32", "bfloat16")
        for state in ("hot", "new")
    }


def test_bytes_that_a_tail_has_to_move(script):
    """Of float32: norm, gradient, parameter and two moments, average, the bfloat16 copy, and zeros."""
    tail = script("tail")
    grads = [torch.randn(1000)]
    step, average = 4 + 3 * 8, 8
    moved = {r.workload: r.moved / 1000 for r in tail.one_argument("x", grads, 1)}
    assert moved == {"tail: step with max_norm, x": 4 + step, "tail: step with average, x": step + average}


def test_training(script):
    training = script("training")
    wanted = {}
    for model in MODELS:
        for what in ("whole step", "optimizer's part"):
            wanted[f"training: {model}, {what}"] = ["onepass", "default", "foreach", "fused"]
    assert measured(training) == wanted


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_sharded(script):
    forms = ["onepass", "onepass, DTensor", "default, DTensor", "foreach, DTensor", "fused, DTensor"]
    assert measured(script("sharded")) == {"sharded: 100 x 100": forms}


def test_an_optimizers_part_is_a_part(script):
    training = script("training")
    for (name, workload), optimizer in zip(training.workloads(quick=True), MODELS.values(), strict=True):
        whole, part = training.compare(name, workload, rounds=2)
        assert whole.optimizer == part.optimizer == optimizer
        for contender in whole.samples:
            assert all(p < w for p, w in zip(part.samples[contender], whole.samples[contender], strict=True))


def test_schedulers(script):
    surroundings = script("surroundings")
    found = {r.workload: list(r.samples) for r in surroundings.schedulers(rounds=1)}
    of = ("1 group", "10 groups")
    assert found == {f"scheduler: {name}, {groups}": ["onepass", "torch"] for name in SCHEDULERS for groups in of}


def test_logs(script):
    surroundings = script("surroundings")
    found = {r.workload: list(r.samples) for r in surroundings.logs(quick=True, rounds=1)}
    wanted = {}
    for model in LOGGED:
        for what in ("training step", "step"):
            for writer in ("no writer", "TensorBoard"):
                wanted[f"log_to: {model}, {what}, {writer}"] = ["off", "on"]
    assert found == wanted


def test_surroundings_are_all_measured(script, monkeypatch):
    surroundings = script("surroundings")
    monkeypatch.setattr(surroundings, "schedulers", lambda rounds: iter(["schedulers"]))
    monkeypatch.setattr(surroundings, "logs", lambda quick, rounds: iter(["logs"]))
    first, second, imports = surroundings.measure(quick=True, rounds=1)
    assert (first, second) == ("schedulers", "logs")
    assert list(imports.samples) == ["torch", "torch and onepass"]
    assert all(seconds > 0.05 for (seconds,) in imports.samples.values())


def test_sizes(script, monkeypatch):
    surroundings = script("surroundings")
    monkeypatch.delenv("ONEPASS_BENCH_INSTALL", raising=False)
    told = surroundings.facts()
    core = Path(onepass._core.__file__).stat().st_size
    assert told["size of _core"] == f"{core / 1000:,.0f} KB"
    whole = float(told["installed size"].removesuffix(" KB").replace(",", ""))
    assert core / 1000 + 100 < whole < core / 1000 + 20_000  # the Python files, and perhaps the CUDA kernels
    assert "pip install ." not in told
    monkeypatch.setattr(surroundings, "install_seconds", lambda: 21.4)
    assert surroundings.facts(install=True)["pip install ."] == "21 s"


# ---- Nothing that is wrong is timed ----


class Wrong(onepass.AdamW):
    """Leaves one element a ten-thousandth off."""

    def _step_all(self):
        super()._step_all()
        self.param_groups[0]["params"][-1].data[-1] += 1e-4


@pytest.fixture
def nothing_timed(monkeypatch):
    def forbid(module):
        for name in ("sample_in_turn", "time_in_turn"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("it was timed"))

    return forbid


def test_a_wrong_optimizer_is_refused_in_the_tail(script, monkeypatch, nothing_timed):
    def wrong_optimizer(tail):
        return Wrong(tail.params, lr=1e-3, max_norm=1.0, average=tail.average)

    tail = script("tail")
    nothing_timed(tail)
    monkeypatch.setattr(tail.OnepassTail, "new_optimizer", wrong_optimizer)
    with pytest.raises(AssertionError, match="tail, fused: parameters: 1 of 65536 elements differ"):
        next(tail.measure(quick=True, rounds=1))


def test_a_wrong_function_is_refused_in_clipping(script, monkeypatch, nothing_timed):
    clip = script("clip")
    nothing_timed(clip)
    monkeypatch.setattr(onepass, "clip_grad_norm_", lambda params, limit: None)
    with pytest.raises(AssertionError, match=r"clip, norm above, 16 x 4M float32: torch: .* elements differ"):
        next(clip.measure(quick=True, rounds=1))


def test_a_wrong_optimizer_is_refused_among_dtensors(script, monkeypatch, nothing_timed):
    sharded = script("sharded")
    nothing_timed(sharded)
    monkeypatch.setattr(sharded, "ADAMW", sharded.ADAMW._replace(ours=type("AdamW", (Wrong,), {})))
    with pytest.raises(AssertionError, match="AdamW against default, DTensor: 1 of 100 elements differ"):
        next(sharded.measure(quick=True, rounds=1))


def test_a_wrong_optimizer_is_refused_in_training(script, monkeypatch, nothing_timed):
    training = script("training")
    nothing_timed(training)
    monkeypatch.setitem(training.CONTENDERS, "onepass", (Wrong, onepass.SparseAdam, {}))
    with pytest.raises(AssertionError, match=r"digits net: default: .* elements differ"):
        next(training.measure(quick=True, rounds=1))


@pytest.mark.parametrize("name", ["StepLR", "ScheduleLR"])
def test_a_wrong_scheduler_is_refused(script, monkeypatch, nothing_timed, name):
    surroundings = script("surroundings")
    nothing_timed(surroundings)
    monkeypatch.setattr(
        surroundings, "SCHEDULERS", {name: surroundings.SCHEDULERS["StepLR"]} if name == "StepLR" else {}
    )
    cls = getattr(surroundings.ours, name)
    get_lr = cls.get_lr
    monkeypatch.setattr(cls, "get_lr", lambda self: [rate * 1.000001 for rate in get_lr(self)])
    with pytest.raises(AssertionError, match=f"{name}: rates differ"):
        next(surroundings.schedulers(rounds=1))


def test_a_log_that_changes_training_is_refused(script, monkeypatch):
    surroundings = script("surroundings")

    def log_to(writer, optimizer, interval):
        optimizer.register_step_post_hook(lambda *_: optimizer.param_groups[0]["params"][0].data.mul_(1.0001))

    monkeypatch.setattr(onepass, "log_to", log_to)
    with pytest.raises(AssertionError, match="logging has changed a parameter"):
        next(surroundings.logs(quick=True, rounds=1))
