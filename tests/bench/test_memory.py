"""bench/memory.py measures every contender that is installed, and report.py shows it."""

import json
import sys

import onepass
import pytest
import torch


@pytest.fixture
def memory(question, monkeypatch):
    module = question("memory")
    monkeypatch.setattr(module, "LR", {"Lion": 3e-4})
    monkeypatch.setattr(module, "SEEDS", (0, 1))
    return module


def test_every_contender_is_measured(memory, tmp_path, monkeypatch, capsys, one_thread):
    """Also the training of the demo's transformer with 8-bit states."""
    path = tmp_path / "states.json"
    monkeypatch.setattr(sys, "argv", ["memory.py", "--quick", "--rounds", "1", "--json", str(path)])
    assert memory.main() == 0
    told = json.loads(path.read_text())
    wanted = ["onepass, float32", "onepass, bfloat16", "onepass, 8 bits"]
    rows = {row["contender"]: row for row in told["states"]}
    assert list(rows)[:3] == wanted
    assert set(rows) | {name.removeprefix("Lion, ") for name in told["missing"]} == set(memory.contenders("Lion"))
    # Vectors of the transformer are not part of it: these are the matrices of the timed step.
    assert [rows[name]["bytes of states"] for name in wanted] == [4.0, 2.0, pytest.approx(1 + 1 / 32, abs=1e-3)]
    assert [rows[name]["bytes with parameter"] for name in wanted] == [8.0, 6.0, pytest.approx(5 + 1 / 32, abs=1e-3)]
    losses = {name: rows[name]["losses"] for name in wanted}
    assert all(len(of_seeds) == 2 for of_seeds in losses.values())
    assert losses[wanted[2]] == pytest.approx(losses[wanted[0]], rel=3e-3)
    assert all(rows[name]["largest update"] == pytest.approx(1, abs=0.05) for name in wanted)  # Lion's is always lr
    assert rows[wanted[0]]["loss apart"] == 0
    assert "| Lion | onepass, 8 bits | 1.03 | 5.03 |" in capsys.readouterr().out

    monkeypatch.setattr(memory, "train", None)  # not called
    again = tmp_path / "again.json"
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(again), "--trained", str(path)])
    assert memory.main() == 0
    for row in json.loads(again.read_text())["states"]:
        assert {**row, "ns/parameter": 0} == {**rows[row["contender"]], "ns/parameter": 0}


def test_a_contender_that_is_wrong_is_not_timed(memory, monkeypatch, one_thread):
    monkeypatch.setattr(onepass, "Thrice", lambda params, lr: onepass.Lion(params, lr=3 * lr), raising=False)
    both = {"right": memory.Contender("onepass:Lion", {}), "wrong": memory.Contender("onepass:Thrice", {})}
    with pytest.raises(AssertionError, match=r"Lion, wrong: .* elements differ"):
        memory.time("Lion", both, True, 1)


def test_the_bytes_of_a_subclass_are_those_of_its_tensors(memory):
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)
    inner = [getattr(nested, name) for name in nested.__tensor_flatten__()[0]]
    assert memory.nbytes(nested) == sum(tensor.nbytes for tensor in inner) > 20
    assert memory.nbytes(torch.zeros(3, dtype=torch.bfloat16)) == 6
