"""bench/run.py and the questions about steps: every contender is measured, checked first, and told of."""

import subprocess
import sys
from pathlib import Path

import onepass
import pytest
import torch
from onepass.cli import bench, timing

BENCH = Path(__file__).parents[2] / "bench"
CLASSES = {subject.name for subject in bench.SUBJECTS}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The file that a quick run writes."""
    path = tmp_path_factory.mktemp("bench") / "run.json"
    command = [BENCH / "run.py", "large", "small", "scaling", "formats", "--quick", "--rounds", "1", "--threads", "1"]
    done = subprocess.run([sys.executable, *command, "--json", path], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return *bench.from_json(path.read_text()), done.stdout


def of(results, question, workload):
    return {r.optimizer: r for r in results if (r.question, r.workload) == (question, workload)}


def test_every_question_measures_every_contender(told):
    _, results, _ = told
    for found in results:
        assert all(len(samples) == 1 and samples[0] > 0 for samples in found.samples.values()), found
    for where, workload in (
        ("large", "large: 16 x 4M"),
        ("small", "small: 1000 x 100"),
        ("small", bench.FRESH),
        ("small", "MLP: 6 tensors"),
    ):
        rows = of(results, where, workload)
        assert rows.keys() == CLASSES
        for subject in bench.SUBJECTS:
            assert set(subject.makers()) <= set(rows[subject.name].samples)
            assert rows[subject.name].first == "onepass"
    others = {r.optimizer for r in results if r.question == "large"} - CLASSES
    assert others == {"SparseAdam", "Adafactor", "CAME", "Muon", "LBFGS", "Lookahead"}
    assert {"onepass", "default", "foreach", "fused"} <= set(of(results, "small", "small: 100 x 10")["AdamW"].samples)
    assert {"one group", "a group each"} == set(of(results, "small", "500 groups")["Adam"].samples)
    isas = of(results, "scaling", "ISA: 16 x 4096 float32, 1 thread")["AdamW"].samples
    assert set(isas) == {name for name, supported in onepass._core.isas().items() if supported}
    assert "onepass, 1 thread" in of(results, "scaling", "threads: 1000 x 100")["AdamW"].samples
    for name in ("float32", "bfloat16", "float16", "mixed", "states"):
        assert "limit" in of(results, "formats", f"formats: {name}")["AdamW"].samples


def test_the_bytes_of_a_step(told):
    """Each array counts once for every time that it must be read or written."""
    _, results, _ = told
    for name, a_parameter in (("float32", 28), ("bfloat16", 14), ("float16", 14), ("mixed", 22), ("states", 20)):
        found = of(results, "formats", f"formats: {name}")["AdamW"]
        assert found.moved == a_parameter * found.elements
    sgd = of(results, "formats", "formats: states")["SGD"]
    assert sgd.moved == (4 + 8 + 4) * sgd.elements


def test_the_limit_of_a_format_moves_as_many_bytes(question):
    as_floats = question("formats").as_floats
    for dtypes, shapes in (
        ("fff", [(1, 2)]),
        ("hhff", [(1, 5)]),  # mixed: a gradient in 16 bits, and states twice as large
        ("ffhh", [(1, 2), (1, 2)]),
        ("hh", [(1, 1)]),
    ):
        arrays = [torch.zeros(8, dtype=torch.float32 if kind == "f" else torch.bfloat16) for kind in dtypes]
        rows = as_floats([arrays])
        assert [(1, len(row) - 1) for row in rows] == shapes
        sizes = [array.numel() * array.element_size() for array in arrays]
        assert sum(4 * row[0].numel() * (2 * len(row) - 1) for row in rows) == 2 * sum(sizes) - sizes[0]


def test_what_is_missing_is_told(told, question):
    facts, _, text = told
    missing = question("peers").missing()
    assert facts["missing"] == missing
    assert all(f"missing: {name}" in text for name in missing)
    assert facts["quick"] is True
    assert facts["seconds"].keys() == {"large", "small", "scaling", "formats"}
    assert any("torch.compile is not measured" in note for note in facts["notes"])


def test_all_or_some_questions_must_be_named():
    for arguments in ([], ["--all", "small"], ["nothing"]):
        done = subprocess.run([sys.executable, BENCH / "run.py", *arguments], capture_output=True, text=True)
        assert done.returncode == 2, done.stdout + done.stderr


def test_a_wrong_result_is_not_timed(question, capsys):
    def measure(quick, rounds):
        yield timing.Result("first", "SGD", 1, 1, {"onepass": [1.0], "default": [2.0]})
        yield "one thing could not be measured"
        raise AssertionError("3 of 4 elements differ")

    results, notes, right = question("run").ask("large", measure, True, 1)
    assert not right
    assert [r.question for r in results] == ["large"]
    assert notes == ["large: one thing could not be measured"]
    assert "large: wrong result, not timed: 3 of 4 elements differ" in capsys.readouterr().err


def test_a_peer_that_is_wrong_is_left_out_and_named():
    def wrong(params):
        def step():
            with torch.no_grad():
                params[0][0] += 1.0

        return step

    (subject,) = [s for s in bench.SUBJECTS if s.name == "SGD"]
    grads = timing.gradients([(8,), (3, 5)])
    left_out = []
    found = bench.compare(subject, "w", grads, 1, {"bad": wrong}, left_out)
    assert left_out == ["SGD against bad: 8 of 8 elements differ, so it is not timed"]
    assert "bad" not in found.samples
    with pytest.raises(AssertionError, match="SGD against bad"):
        bench.compare(subject, "w", grads, 1, {"bad": wrong})
    with pytest.raises(AssertionError, match="SGD against default"):
        bench.compare(subject, "w", grads, 1, {"default": wrong}, [])


def test_the_ends_of_a_tensor_too_large_for_two_are_checked(question, monkeypatch):
    scaling = question("scaling")
    monkeypatch.setattr(scaling, "ENDS", 100)
    assert scaling.huge(10_000, torch.float32, 1).samples.keys() == {"onepass", "limit"}

    class Wrong(onepass.AdamW):
        def _step_all(self):
            super()._step_all()
            self.param_groups[0]["params"][0].data[-1] += 1e-3

    monkeypatch.setattr(onepass, "AdamW", Wrong)
    with pytest.raises(AssertionError, match="fused of the ends"):
        scaling.huge(10_000, torch.float32, 1)


def test_what_has_no_room_is_told(question, monkeypatch):
    scaling = question("scaling")
    monkeypatch.setattr(scaling, "available_memory", lambda: 1 << 20)
    told = [found for found in scaling.measure(True, 1) if isinstance(found, str)]
    assert [text.split(" in ")[0] for text in told] == ["10000000 elements"] * 2


def test_medians_ratios_and_spread():
    found = timing.Result("w", "o", 1, 1, {"onepass": [1.0, 2.0, 4.0, 2.0], "default": [4.0, 4.0, 8.0, 6.0]})
    assert found.seconds() == 2.0
    assert found.seconds("default") == 5.0
    assert found.ratios() == {"default": 2.5}  # of 4, 2, 2 and 3
    assert found.spread() == (2.5 - 1.75) / 2 / 2.0


def test_figures_survive_the_file():
    found = timing.Result("w", "o", 7, 3, {"onepass": [0.123456], "limit": [2e-9]}, moved=9, question="large")
    told, (again,) = bench.from_json(bench.as_json([found], 1, missing={"peer": "why"}))
    assert again == timing.Result("w", "o", 7, 3, {"onepass": [0.1235], "limit": [2e-9]}, moved=9, question="large")
    assert told["missing"] == {"peer": "why"}
    assert told["rounds"] == 1


def test_a_sample_of_short_calls_covers_many_and_one_after_preparation_a_single_call():
    calls, prepared = [], []
    samples = timing.time_in_turn({"a": lambda: calls.append(1)}, 3, clock=timing.Clock(sample=1e-3))
    assert len(samples["a"]) == 3
    assert 2 + 3 < len(calls) <= 2 + 3 * 1000
    calls.clear()
    timing.time_in_turn({"a": lambda: calls.append(1)}, 3, before=prepared.append)
    assert len(calls) == 3
    assert prepared == ["a"] * 3


def test_the_clock_waits_for_the_device_before_and_after_the_calls():
    events = []
    clock = timing.Clock(synchronize=lambda: events.append("wait"))
    assert clock.seconds(lambda: events.append("call"), 2) > 0
    assert events == ["wait", "call", "call", "wait"]
