"""bench/gpu.py, as far as it goes without a GPU: a dry run on the CPU, and what stops it."""

import importlib.util
import math
import re
import sys
import time
from pathlib import Path

import onepass
import pytest
import torch
from onepass.cli import bench

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
    told, results = bench.from_json((tmp_path / "gpu.json").read_text())
    text = capsys.readouterr().out
    device = gpu.Device("cpu", 1e-3)
    for workload in gpu.WORKLOADS:
        rows = [r for r in results if r.workload == workload.name]
        if workload.capturable:
            assert not rows
            assert f"{workload.name}: left out" in text
            continue
        assert [(r.optimizer, r.question) for r in rows] == [
            (name, clock) for name in workload.optimizers for clock in ("device time", "wall time")
        ]
        for r in rows:
            contenders = gpu.makers(workload, gpu.SUBJECTS[r.optimizer], device)
            assert {"onepass", "for-loop", "foreach"} <= set(contenders)
            assert [name for name in r.samples if name != "limit"] == list(contenders)
            assert all(len(samples) == 2 and min(samples) > 0 for samples in r.samples.values())
    assert {("limit" in r.samples) for r in results if r.question == "device time"} == {True, False}
    assert not any("limit" in r.samples for r in results if r.question == "wall time")
    assert all(line in text for line in told["targets"])
    assert {line.split()[0] for line in told["targets"]} <= {"met", "MISSED"}


def test_bytes_are_counted_once_for_each_time_they_must_move(gpu):
    workload = gpu.Workload(name="one", tensors=2, length=1 << 18)
    device = gpu.Device("cpu", 1e-3)
    elements = 2 << 18
    adamw, sgd = (gpu.compare(workload, gpu.SUBJECTS[name], device, 2) for name in ("AdamW", "SGD"))
    assert adamw.traffic["onepass"] == adamw.traffic["fused"] == adamw.device.moved == 28 * elements
    assert sgd.traffic["foreach"] == 20 * elements
    small_states = gpu.Workload(name="one", tensors=2, length=1 << 18, own={"state_dtype": torch.bfloat16}, tolerance=1)
    adamw = gpu.compare(small_states, gpu.SUBJECTS["AdamW"], device, 2)
    assert (adamw.traffic["onepass"], adamw.traffic["fused"]) == (20 * elements, 28 * elements)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU: not run")
def test_a_graph_is_measured(gpu):
    workload = gpu.Workload(name="graph", tensors=3, length=1000, graph=True)
    result = gpu.compare(workload, gpu.SUBJECTS["AdamW"], gpu.Device("cuda", 1e-3), 2)
    assert {"onepass", "foreach", "fused"} <= set(result.device.samples)


def test_the_line_of_a_contender(gpu):
    samples = {"onepass": [1.0, 2.0, 3.0, 4.0, 5.0], "fused": [2.0, 2.0, 9.0, 4.0, 5.0]}
    limit = {"limit": [0.5, 1.0, 1.5, 2.0, 2.5]}
    device = gpu.Result("w", "SGD", 10, 1, samples | limit, moved=30)
    compared = gpu.Comparison(device, gpu.Result("w", "SGD", 10, 1, samples), {"onepass": 30, "fused": 60})
    ours, fused = (line.split()[2:] for line in gpu.lines_of(compared))
    assert ours == ["onepass", "3000000.0", "33.3%", "3000000.0", "33.3%", "1.00", "1.00", "0", "0.500"]
    assert fused == ["fused", "4000000.0", "37.5%", "4000000.0", "37.5%", "1.00", "1.00", "0", "1.000"]
    del device.samples["limit"]
    assert [line.split()[-1] for line in gpu.lines_of(compared)] == ["1.00", "1.00"]


class Event:
    """An event of a device on which each call takes a hundredth of a second."""

    calls = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.calls

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 10.0 * (end.at - self.at)


def test_the_devices_clock_times_calls_after_copies_that_keep_it_busy(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    copies = []

    def run():
        Event.calls += 1
        time.sleep(gpu.AHEAD / 10)

    def copy():
        Event.calls += 1
        copies.append(1)

    clock = gpu.EventClock(1.0, copy, copy_seconds=gpu.AHEAD / 4)
    sample = clock.sampler(run)
    before = Event.calls
    assert math.isclose(sample(), 0.01)
    launched = Event.calls - before - len(copies)
    assert 1 <= launched <= 10
    assert 1 <= len(copies) <= 8


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
    assert not re.search(r"SGD +onepass", told.out)


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
