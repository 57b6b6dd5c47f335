"""Runs the scripts of docs/ that need nothing but torch; tests/ecosystem/test_pages.py runs the others."""

import os
import re
import subprocess
import sys

import pytest
from pages import NEED_THE_EXTRA, PAGES, ROOT, assert_trained_by_kernels, script

ALONE = ["amp", "compile"]
OF_TWO = ["ddp", "fsdp", "zero"]
WITH_FUNCTIONAL = ROOT / "tests" / "support" / "with_functional.py"


def test_every_page_is_run():
    assert {*ALONE, *OF_TWO, *NEED_THE_EXTRA} == set(PAGES)


def test_readme_links_to_every_page():
    assert sorted(re.findall(r"\(docs/(\w+)\.md\)", (ROOT / "README.md").read_text())) == sorted(PAGES)


def run(*command, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ALONE)
def test_a_script(name, tmp_path):
    assert_trained_by_kernels(run(script(name, tmp_path), cwd=tmp_path))


@pytest.mark.parametrize("name", OF_TWO)
def test_a_script_of_two_processes(name, tmp_path):
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    started = run(*torchrun, WITH_FUNCTIONAL, script(name, tmp_path), cwd=tmp_path)
    assert_trained_by_kernels(started, processes=2)


@pytest.mark.parametrize("name", PAGES)
def test_a_script_is_formatted_as_the_rest(name, tmp_path):
    config = "--config", ROOT / "pyproject.toml"
    run("-m", "ruff", "format", "--check", *config, script(name, tmp_path), cwd=tmp_path)
    run("-m", "ruff", "check", "--ignore", "D", *config, script(name, tmp_path), cwd=tmp_path)
