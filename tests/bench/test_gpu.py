"""bench/gpu.py, as far as it goes without a GPU: a dry run on the CPU, and what stops it."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import onepass
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.py"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def dry_run(gpu, *args):
    return gpu.main(["--device", "cpu", "--quick", "--rounds", "2", *map(str, args)])


def test_a_dry_run_measures_every_contender_in_every_workload(gpu, tmp_path, capsys):
    assert dry_run(gpu, "--json", tmp_path / "gpu.json") == 0
    told = json.loads((tmp_path / "gpu.json").read_text())
    text = capsys.readouterr().out
    device = gpu.Device("cpu", 1e-3)
    for workload in gpu.WORKLOADS:
        rows = [row for row in told["results"] if row["workload"] == workload.name]
        if workload.capturable:
            assert not rows
            assert f"{workload.name:<26}left out" in text
            continue
        assert [row["optimizer"] for row in rows] == workload.optimizers
        for row in rows:
            contenders = gpu.makers(workload, gpu.SUBJECTS[row["optimizer"]], device)
            assert {"onepass", "for-loop", "foreach"} <= set(contenders)
            for clock in ("device", "wall"):
                assert list(row[clock]) == list(contenders)
                assert all(timing["seconds"] > 0 for timing in row[clock].values())
                assert row[clock]["onepass"]["ratio"] == 1
            assert all(fraction > 0 for fraction in row["of_copy"].values())
    assert any(row["of_copy"] for row in told["results"])
    assert any(row["replicas"] > 1 for row in told["results"])
    assert all(line in text for line in told["targets"])
    assert {line.split()[0] for line in told["targets"]} <= {"met", "MISSED"}


def test_bytes_are_counted_once_for_each_time_they_must_move(gpu):
    workload = gpu.Workload(name="one", tensors=2, length=1 << 18)
    device = gpu.Device("cpu", 1e-3)
    adamw, sgd = (gpu.compare(workload, gpu.SUBJECTS[name], device, 2) for name in ("AdamW", "SGD"))
    assert adamw.traffic["onepass"] == adamw.traffic["fused"] == 28 * adamw.elements
    assert sgd.traffic["foreach"] == 20 * sgd.elements
    small_states = gpu.Workload(name="one", tensors=2, length=1 << 18, own={"state_dtype": torch.bfloat16}, tolerance=1)
    adamw = gpu.compare(small_states, gpu.SUBJECTS["AdamW"], device, 2)
    assert (adamw.traffic["onepass"], adamw.traffic["fused"]) == (20 * adamw.elements, 28 * adamw.elements)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU: not run")
def test_a_graph_is_measured(gpu):
    workload = gpu.Workload(name="graph", tensors=3, length=1000, graph=True)
    result = gpu.compare(workload, gpu.SUBJECTS["AdamW"], gpu.Device("cuda", 1e-3), 2)
    assert {"onepass", "foreach", "fused"} <= set(result.device)


def test_medians_spreads_and_ratios(gpu):
    timings = gpu.timings({"onepass": [1.0, 2.0, 3.0, 4.0, 5.0], "fused": [2.0, 2.0, 9.0, 4.0, 5.0]})
    assert timings["onepass"] == gpu.Timing(3.0, 1 / 3, 1.0)
    assert timings["fused"].seconds == 4.0
    assert timings["fused"].ratio == 1.0
    assert math.isclose(timings["fused"].spread, 1.5 / 4)


@pytest.mark.parametrize("wrong", [1e-4, math.nan])
def test_nothing_that_is_wrong_is_timed(gpu, wrong, monkeypatch, capsys):
    class SGD(onepass.SGD):
        def _step_all(self):
            super()._step_all()
            self.param_groups[0]["params"][-1].data[-1] += wrong

    monkeypatch.setitem(gpu.SUBJECTS, "SGD", gpu.SUBJECTS["SGD"]._replace(ours=SGD))
    assert dry_run(gpu, "--optimizers", "SGD") == 1
    told = capsys.readouterr()
    assert "large: 200 x 1M: SGD against for-loop: 1 of 65536 elements differ" in told.err
    assert "SGD       onepass" not in told.out


def test_torchs_path_is_not_taken_for_kernels(gpu, monkeypatch, capsys):
    class Lion(onepass.Lion):
        def _step_all(self):
            type(self).torch_step(self)

    monkeypatch.setitem(gpu.SUBJECTS, "Lion", gpu.SUBJECTS["Lion"]._replace(ours=Lion))
    assert dry_run(gpu, "--optimizers", "Lion") == 1
    assert "Lion: kernels stepped 0 of 14 tensors; torch's code: {" in capsys.readouterr().err


def test_foreach_lion_is_lion(gpu):
    torch.manual_seed(0)
    ours, theirs = ([torch.randn(7, generator=torch.Generator().manual_seed(0))] for _ in range(2))
    makers = {"ours": onepass.Lion(ours, lr=0.1, weight_decay=0.1), "torch": gpu.ForeachLion(theirs, 0.1, 0.1)}
    for _ in range(3):
        grad = torch.randn(7)
        for (p,), optimizer in zip((ours, theirs), makers.values(), strict=True):
            p.grad = grad
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_without_a_gpu_it_says_so(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    told = capsys.readouterr()
    assert len(told.err.splitlines()) == 1
    assert "no GPU" in told.err
    assert not told.out
