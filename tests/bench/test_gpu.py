"""bench/gpu.py, as far as it goes without a GPU: a dry run on the CPU, and what stops it."""

import functools
import math
import re
import time

import gpu
import gpu_device
import gpu_training
import onepass
import pytest
import torch
from onepass.cli import bench

pytestmark = pytest.mark.usefixtures("one_thread")


def dry_run(*args):
    return gpu.main(["--device", "cpu", "--quick", "--rounds", "2", *map(str, args)])


def test_a_dry_run_measures_every_contender_in_every_workload(tmp_path, capsys):
    assert dry_run("--json", tmp_path / "gpu.json") == 0
    told, results = bench.from_json((tmp_path / "gpu.json").read_text())
    text = capsys.readouterr().out
    device = gpu.Device("cpu", 1e-3)
    for workload in gpu.WORKLOADS + gpu.MORE_WORKLOADS:
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
            assert {"onepass", "foreach"} <= set(contenders)
            assert [name for name in r.samples if name != "limit"] == list(contenders)
            assert all(len(samples) == 2 and min(samples) > 0 for samples in r.samples.values())
    whole, part = (r for r in results if r.workload.startswith("training"))
    assert set(whole.samples) == set(part.samples) == set(told["losses"]) == {"onepass", "foreach", "fused"}
    assert all(0 < p < w for name in part.samples for p, w in zip(part.samples[name], whole.samples[name], strict=True))
    assert all(len(losses) == gpu_training.STEPS for losses in told["losses"].values())
    assert not told["not measured"]
    assert len(told["seconds"]) == len(results) / 2
    assert {("limit" in r.samples) for r in results if r.question == "device time"} == {True, False}
    assert not any("limit" in r.samples for r in results if r.question == "wall time")
    assert all(line in text for line in told["targets"])
    assert {line.split()[0] for line in told["targets"]} <= {"met", "MISSED"}


def test_bytes_are_counted_once_for_each_time_they_must_move():
    workload = gpu.Workload(name="one", tensors=2, length=1 << 18)
    device = gpu.Device("cpu", 1e-3)
    elements = 2 << 18
    adamw, sgd = (gpu.compare(workload, gpu.SUBJECTS[name], device, 2) for name in ("AdamW", "SGD"))
    assert adamw.traffic["onepass"] == adamw.traffic["fused"] == adamw.device.moved == 28 * elements
    assert sgd.traffic["foreach"] == 20 * elements
    small_states = gpu.Workload(name="one", tensors=2, length=1 << 18, own={"state_dtype": torch.bfloat16}, tolerance=1)
    adamw = gpu.compare(small_states, gpu.SUBJECTS["AdamW"], device, 2)
    assert (adamw.traffic["onepass"], adamw.traffic["fused"]) == (20 * elements, 28 * elements)
    tail = gpu.Workload(name="one", tensors=2, length=1 << 18, tail=True)
    adamw = gpu.compare(tail, gpu.SUBJECTS["AdamW"], device, 2)
    assert set(adamw.traffic.values()) == {(4 + 28 + 8) * elements}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU: not run")
@pytest.mark.parametrize("tail", [False, True])
def test_a_graph_is_measured(tail):
    workload = gpu.Workload(name="graph", tensors=3, length=1000, capturable=True, graph=True, tail=tail)
    result = gpu.compare(workload, gpu.SUBJECTS["AdamW"], gpu.Device("cuda", 1e-3), 2)
    assert {"onepass", "foreach", "fused"} <= set(result.device.samples)


def test_replays_are_checked(monkeypatch):
    workload = gpu.Workload(name="graph", tensors=3, length=1000, graph=True, tail=True)
    device = gpu.Device("cpu", 1e-3)
    captures = []

    def captured(step):
        captures.append(step)
        return functools.partial(step)

    monkeypatch.setattr(gpu, "captured", captured)
    gradients = functools.partial(workload.gradients, device.torch)
    ours, *others = (
        build(workload.params(gradients, 0)) for build in gpu.makers(workload, gpu.SUBJECTS["AdamW"], device).values()
    )
    assert len(others) == 2
    for contender in (ours, *others):
        assert gpu.prepared(contender, 3, graph=True).func == contender.run
    for other in others:
        gpu.check("tail", ours, other, False, 1e-6)
    assert len(captures) == 3
    ours.run()
    with pytest.raises(AssertionError, match="tail, parameters: 3000 of 3000"):
        gpu.check("tail", ours, others[0], False, 1e-6)


@pytest.mark.parametrize(("name", "value"), [("MAX_NORM", 0.9), ("DECAY", 0.9)])
def test_a_tail_with_another_norm_or_average_is_found(name, value, monkeypatch):
    workload = gpu.Workload(name="tail", tensors=3, length=1000, tail=True)

    class OtherTail(gpu.gpu_contenders.OnepassTail):
        def __init__(self, make, params):
            with monkeypatch.context() as patch:
                patch.setattr(gpu.gpu_contenders, name, value)
                super().__init__(make, params)

    if name == "MAX_NORM":  # AdamW divides by the size of the gradients, so another factor of all of them is no error
        monkeypatch.setattr(
            gpu.gpu_contenders.TorchTail,
            "step",
            lambda self: (self.optimizer.step(), self.average.update_parameters(self.model)),
        )
    else:
        monkeypatch.setattr(gpu.gpu_contenders, "OnepassTail", OtherTail)
    what = "parameters" if name == "MAX_NORM" else "averages"
    with pytest.raises(AssertionError, match=f"tail: AdamW against foreach, {what}: .* differ"):
        gpu.compare(workload, gpu.SUBJECTS["AdamW"], gpu.Device("cpu", 1e-3), 2)


def test_the_line_of_a_contender():
    samples = {"onepass": [1.0, 2.0, 3.0, 4.0, 5.0], "fused": [2.0, 2.0, 9.0, 4.0, 5.0]}
    limit = {"limit": [0.5, 1.0, 1.5, 2.0, 2.5]}
    device = gpu.Result("w", "SGD", 10, 1, samples | limit, moved=30)
    compared = gpu.Comparison(device, gpu.Result("w", "SGD", 10, 1, samples), {"onepass": 30, "fused": 60})
    ours, fused = (line.split()[2:] for line in compared.lines())
    assert ours == ["onepass", "3000000.0", "33.3%", "3000000.0", "33.3%", "1.00", "1.00", "0", "0.500"]
    assert fused == ["fused", "4000000.0", "37.5%", "4000000.0", "37.5%", "1.00", "1.00", "0", "1.000"]
    del device.samples["limit"]
    compared.launch_bound.append("fused")
    assert [line.split()[-1] for line in compared.lines()] == ["1.00", "1.00"]
    assert [line.split()[3] for line in compared.lines()] == ["3000000.0", "~4000000.0"]


class Event:
    """An event of a device on which each call takes a hundredth of a second."""

    calls = 0
    late = 0  # how many of the next queries find that the device is waiting

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.calls

    def query(self):
        Event.late -= 1
        return Event.late >= 0

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 10.0 * (end.at - self.at)


@pytest.mark.parametrize("late", [0, 1, 2, 99])
def test_the_devices_clock_times_calls_after_copies_that_keep_it_busy(late, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(time, "perf_counter", lambda: host_seconds)
    copies = []
    host_seconds = 0.0
    ahead, most = gpu_device.AHEAD, 21

    def run():
        nonlocal host_seconds
        Event.calls += 1
        host_seconds += ahead / 10

    def copy():
        Event.calls += 1
        copies.append(1)

    clock = gpu_device.EventClock(1.0, copy, copy_seconds=gpu_device.BUSY / most)
    sample = clock.sampler(run)
    before, Event.late = Event.calls, late
    assert math.isclose(sample(), 0.01)
    launched = Event.calls - before - len(copies)
    first = math.ceil(gpu_device.MARGIN * ahead / clock.copy_seconds)
    tries = [first]
    while len(tries) <= late and tries[-1] < most:
        tries.append(min(most, 2 * tries[-1]))
    assert len(copies) == sum(tries)
    assert launched == 10 * len(tries)
    assert clock.launch_bound == ([run] if late == 99 else [])
    copies.clear()
    Event.late = 0
    sample()
    assert not clock.launch_bound
    assert len(copies) == tries[-1]


def test_a_gpu_has_a_clock_of_its_own():
    device = gpu.Device("cpu", 1e-3)
    device.clock = gpu_device.EventClock(1e-3, device.copy, 1e-3)
    device.clock.launch_bound.append(device.copy)
    assert device.take_launch_bound() == [device.copy]
    assert device.take_launch_bound() == []


@pytest.mark.parametrize(
    ("ours", "foreach", "differs"),
    [
        (0.0, 0.0, False),
        (0.004, 0.0, False),
        (0.006, 0.0, True),
        (0.04, 0.01, False),
        (0.06, 0.01, True),
        (math.nan, 1.0, True),
    ],
)
def test_losses_may_differ_by_rounding(ours, foreach, differs):
    losses = {"onepass": [2.0, 1.0 + ours], "foreach": [2.0, 1.0 - foreach], "fused": [2.0, 1.0]}
    if not differs:
        gpu_training.check(losses)
        return
    with pytest.raises(AssertionError, match="losses differ by"):
        gpu_training.check(losses)


@pytest.mark.parametrize("wrong", [1e-4, math.nan])
def test_nothing_that_is_wrong_is_timed(wrong, monkeypatch, capsys):
    class SGD(onepass.SGD):
        def _step_all(self):
            super()._step_all()
            self.param_groups[0]["params"][-1].data[-1] += wrong

    monkeypatch.setitem(gpu.SUBJECTS, "SGD", gpu.SUBJECTS["SGD"]._replace(ours=SGD))
    assert dry_run("--optimizers", "SGD", "--workloads", "large", "small") == 1
    told = capsys.readouterr()
    assert "large: 200 x 1M: SGD against foreach, parameters: 1 of 131072 elements differ" in told.err
    assert not re.search(r"SGD +onepass", told.out)


def test_torchs_path_is_not_taken_for_kernels(monkeypatch, capsys):
    class Lion(onepass.Lion):
        def _step_all(self):
            type(self).torch_step(self)

    monkeypatch.setitem(gpu.SUBJECTS, "Lion", gpu.SUBJECTS["Lion"]._replace(ours=Lion))
    assert dry_run("--optimizers", "Lion") == 1
    assert "Lion: kernels stepped 0 of 14 tensors; torch's code: {" in capsys.readouterr().err


def test_foreach_lion_is_lion():
    torch.manual_seed(0)
    ours, theirs = ([torch.randn(7, generator=torch.Generator().manual_seed(0))] for _ in range(2))
    makers = {
        "ours": onepass.Lion(ours, lr=0.1, weight_decay=0.1),
        "torch": gpu.gpu_contenders.ForeachLion(theirs, 0.1, 0.1),
    }
    for _ in range(3):
        grad = torch.randn(7)
        for (p,), optimizer in zip((ours, theirs), makers.values(), strict=True):
            p.grad = grad
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_after_a_failure_the_others_are_measured(tmp_path, monkeypatch, capsys):
    file = tmp_path / "gpu.json"
    optimizers = gpu.gpu_contenders.optimizers

    def broken(subject, dtype, device):
        if dtype == torch.bfloat16:
            raise RuntimeError("CUDA error: broken\nmore")
        return optimizers(subject, dtype, device)

    monkeypatch.setattr(gpu.gpu_contenders, "optimizers", broken)
    asked = ("--optimizers", "SGD", "--workloads", "bfloat16: ", "float16")
    assert dry_run("--json", file, *asked) == 1
    told, results = bench.from_json(file.read_text())
    assert {r.workload for r in results} == {"float16: 200 x 1M"}
    assert told["not measured"] == {"bfloat16: 200 x 1M: SGD": "RuntimeError: CUDA error: broken"}
    assert "not measured: bfloat16" in capsys.readouterr().out


def test_no_comparison_begins_after_the_time(capsys):
    assert dry_run("--seconds", "0", "--optimizers", "SGD") == 1
    assert "not measured: large: 200 x 1M: SGD: out of time" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    told = capsys.readouterr()
    assert len(told.err.splitlines()) == 1
    assert "no GPU" in told.err
    assert not told.out
