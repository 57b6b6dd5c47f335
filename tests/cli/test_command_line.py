"""``python -m onepass info | demo | bench | schedule``, as a user runs them."""

import json
import os
import subprocess
import sys

import onepass
import pytest
import torch
from onepass.__main__ import main
from onepass.cli import bench
from onepass.cli import lr_find as lr_find_command

PNG = b"\x89PNG\r\n\x1a\n"


def run(*args, ok=True, **env):
    command = [sys.executable, "-m", "onepass", *map(str, args)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=280)
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_info_tells_what_is_in_use():
    forced = run("info", ONEPASS_ISA="baseline", ONEPASS_TUNING="generic")
    told = {name: text.strip() for name, text in (line.split("  ", 1) for line in forced.splitlines())}
    assert told["onepass"] == onepass.__version__
    assert told["chosen"].split()[0] == "baseline"
    assert told["tuning"].split(":")[0] == "generic"
    assert "baseline" in told["instruction sets"]
    assert told["OpenMP runtime"].count("gomp") == 1
    assert {"sgd", "adam", "lion"} <= {rule.lower() for rule in told["kernels for"].split(", ")}


def test_bench_measures_every_optimizer_against_every_peer(tmp_path):
    text = run("bench", "--quick", "--rounds", 2, "--threads", 1, "--json", tmp_path / "b.json")
    told, results = bench.from_json((tmp_path / "b.json").read_text())
    assert told["machine"]["torch"] == torch.__version__
    for subject in bench.SUBJECTS:
        for workload in (*bench.SIZES, bench.FRESH):
            (found,) = [r for r in results if r.optimizer == subject.name and r.workload == workload]
            assert set(subject.makers()) <= set(found.samples)
            assert all(len(samples) == 2 and min(samples) > 0 for samples in found.samples.values())
    assert all(any(r.optimizer in line and r.workload in line for line in text.splitlines()) for r in results)


def test_bench_times_nothing_that_is_wrong(monkeypatch, capsys):
    class SGD(onepass.SGD):
        def _step_all(self):
            super()._step_all()
            self.param_groups[0]["params"][-1].data[-1] += 1e-4

    (subject,) = [s for s in bench.SUBJECTS if s.name == "SGD"]
    monkeypatch.setattr(bench, "SUBJECTS", [subject._replace(ours=SGD)])
    args = bench.argparse.Namespace(quick=True, rounds=1, threads=None, optimizers=["SGD"], json=None)
    assert bench.main(args) == 1
    assert "elements differ" in capsys.readouterr().err


def test_demo_trains_both_and_draws(tmp_path):
    text = run("demo", "--quick", "--threads", 1, "--out", tmp_path)
    assert "digits" in text
    assert "text" in text
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)
    assert json.loads((tmp_path / "demo.json").read_text())


@pytest.mark.parametrize("arguments", [["info"], ["schedule", "cosine(9)"], ["info", "--optimizers"]])
def test_a_reader_that_has_gone_is_no_error(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "onepass", *arguments], stdout=closed, stderr=subprocess.PIPE, text=True, timeout=100
        )
    assert (done.returncode, done.stderr) == (141, "")  # as the shell tells of those that SIGPIPE has ended


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--json", "/nonexistent/b.json"], "No such file"),
        (["--rounds", "0"], "--rounds must be >= 1, got 0"),
        (["--threads", "0"], "set_num_threads"),
    ],
)
def test_bench_tells_at_once_what_it_cannot_do(arguments, why, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", None)
    assert main(["bench", *arguments]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("spelling", ["adamw", "AdamW", "ADAM_W"])
def test_optimizers_are_named_as_everywhere_else(spelling, capsys, monkeypatch):
    chosen = []
    monkeypatch.setattr(bench, "measure", lambda quick, rounds, optimizers: chosen.append(optimizers) or [])
    assert main(["bench", "--optimizers", spelling, "sgd"]) == 0
    assert chosen == [["AdamW", "SGD"]]
    monkeypatch.setattr(lr_find_command, "find", lambda optimizer, *_: chosen.append(optimizer))
    assert main(["lr-find", "--optimizer", spelling]) == 0
    assert chosen[1:] == ["adamw"]
    with pytest.raises(SystemExit):
        main(["bench", "--optimizers", "adamww"])
    assert "there is no optimizer 'adamww': did you mean 'adamw'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--optimizers", "lbfgs"])
    assert "invalid choice: 'LBFGS' (choose from" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["info"], ["info", "--optimizers"], ["--help"], ["bench", "--help"]])
def test_an_ascii_locale(arguments):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "onepass", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_has_no_character_in_the_locale_is_escaped():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "onepass", "schedule", "warmup(3) >> é"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=100)
    assert done.returncode == 2
    assert rb"onepass schedule: " in done.stderr
    assert b"Traceback" not in done.stderr


def test_an_unknown_command_is_refused():
    assert "invalid choice" in run("train", ok=False)
