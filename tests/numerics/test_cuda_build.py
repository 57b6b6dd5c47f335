"""For which GPUs the CUDA kernels are compiled. nvidia-smi is replaced by a script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GPUS = Path(__file__).parents[2] / "cmake" / "gpus.cmake"


@pytest.mark.parametrize(
    ("reported", "found"),
    [
        ("echo 9.0", "90"),
        ("echo 12.0; echo 8.6; echo 12.0; echo 9.0", "86;90;120"),
        ("echo No devices were found", ""),
        ("echo 'NVIDIA-SMI has failed, driver 12.2'; exit 9", ""),
        (None, ""),
    ],
)
def test_the_gpus_of_this_machine_are_those_that_the_driver_reports(tmp_path, reported, found):
    if reported is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f'#!/bin/sh\n[ "$*" = "--query-gpu=compute_cap --format=csv,noheader" ] || exit 1\n{reported}\n'
        )
        program.chmod(0o755)
    script = tmp_path / "print.cmake"
    script.write_text(f'include("{GPUS}")\nonepass_gpus(found)\nmessage("[${{found}}]")\n')
    env = {**os.environ, "PATH": str(tmp_path), "CMAKE_PREFIX_PATH": ""}
    command = [sys.executable, "-m", "cmake", "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF", "-P", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, f"[{found}]\n")
