"""Each allocation of the compiled module in a step fails once: MemoryError, nothing written, the next step right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"

pytestmark = [pytest.mark.cpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What failing_allocations.py prints: the number of failures by scenario."""
    library = tmp_path_factory.mktemp("library") / "failing_new.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["c++", *flags, SUPPORT / "failing_new.cpp", "-o", library], check=True)
    told = subprocess.run(
        [sys.executable, SUPPORT / "failing_allocations.py", library],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout.splitlines()[-1])


def test_a_failed_allocation_leaves_everything_as_it_was(report):
    assert {name: told for name, told in report.items() if not isinstance(told, int)} == {}


def test_allocations_have_failed_in_every_scenario(report):
    assert min(report.values()) > 20
    assert report["Adafactor, batches"] > report["Adafactor, large"]
