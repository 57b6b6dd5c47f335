"""``python -m onepass schedule``, as a user runs it."""

import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from onepass.__main__ import main
from onepass.cli.schedule import text_picture

EXPRESSION = "warmup(500) >> cosine(10000)"


def height_of(line):
    return ["▁▂▃▄▅▆▇█".find(c) + 1 for c in line]


def read(picture, width):
    """The heights of the columns of a picture, in eighths of a row."""
    lines = [line.replace("┤", "│") for line in picture.splitlines()]
    rows = [line.partition("│")[2] for line in lines if "│" in line]
    return np.sum([height_of(row.ljust(width)) for row in rows], axis=0), len(rows)


def test_the_picture_has_the_rates_and_its_axes_are_labelled(capsys):
    assert main(["schedule", EXPRESSION, "--steps", "10500", "--lr", "3e-4"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("learning rate: warmup(500) >> cosine(10000)\n")
    assert "optimizer step" in text
    assert "10,499" in text
    assert " 0.0003 ┤" in text
    assert "0.00015 ┤" in text


@pytest.mark.parametrize("rates", [np.linspace(0, 3, 50), np.linspace(2, -1, 31), np.full(7, 0.2), np.zeros(3)])
def test_each_column_is_as_high_as_its_rate(rates):
    heights, rows = read(text_picture(rates), len(rates))
    low, high = min(0, rates.min()), max(0, rates.max())
    expected = (rates - low) / ((high - low) or 1) * rows * 8
    assert np.abs(heights - expected).max() <= 0.5


def test_a_png(tmp_path):
    file = tmp_path / "schedule.png"
    assert main(["schedule", EXPRESSION, "step(300)", "--steps", "10500", "--png", str(file)]) == 0
    header = file.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", header[16:]) == (840, 432)


def test_a_png_is_written_under_the_very_name_that_is_given(tmp_path):
    for name in ("schedule", "SCHEDULE.PNG"):
        assert main(["schedule", EXPRESSION, "--png", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {"schedule", "SCHEDULE.PNG"}


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("lr", ["1", "0.00012345", "123456789", "-0.000123456"])
def test_no_line_is_longer_than_the_terminal(lr, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    parts = [f"linear({n}000, start={1 / n}, end={1 / (n + 1)})" for n in range(1, 9)]
    assert main(["schedule", " >> ".join(parts), "--lr", lr]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert max(map(len, lines)) > min(columns, 80) - 12
    assert sum("┤" in line for line in lines) == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_block_characters(encoding):
    command = [sys.executable, "-m", "onepass", "schedule", "linear(50)"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, timeout=100, check=True
    )
    assert done.stderr == b""
    picture = done.stdout.decode("ascii").splitlines()[1:]
    rows = [line for line in picture if "|" in line[:9] or "+" in line[:9]]
    assert [row.count("#") for row in rows[:-1]] == sorted(row.count("#") for row in rows[:-1])
    assert rows[-2].count("#") >= 45
    assert rows[-1].endswith("+" + "-" * 51)


def test_the_whole_schedule_by_default(capsys):
    assert main(["schedule", "warmup(5) >> cosine(20)"]) == 0
    assert "25\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["cosin(3)"], "there is no part 'cosin'"),
        (["step(3)"], "has no end: pass the number of steps to plot as --steps"),
        (["step(3)", "--steps", "0"], "--steps must be >= 1, got 0"),
        (["__import__('os').getcwd()"], "at position"),
        (["cosine(9)", "--png", "/nonexistent/x.png"], "No such file"),
        (["cosine(9)", "--png", "x.foo"], "'foo' is not supported"),
        (["cosine(9)", "--steps", str(10**17)], "Unable to allocate"),
        (["cosine(9)", "--lr", "nan"], "--lr must be finite, got nan"),
        (["linear(9, 1e308, -1e308)"], "linear(9, start=1e+308, end=-1e+308) is not finite, or its range"),
    ],
)
def test_errors(arguments, why, capsys):
    assert main(["schedule", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("onepass schedule: ")
    assert why in told


def test_a_png_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["schedule", "cosine(9)", "--png", str(tmp_path / "x.png")]) == 2
    assert "pip install 'onepass[plots]'" in capsys.readouterr().err
