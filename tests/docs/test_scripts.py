"""Runs the Python blocks of README.md and docs/; tests/ecosystem/test_pages.py runs those that need frameworks."""

import os
import re
import subprocess
import sys

import onepass
import pytest
import torch
from onepass import lr_scheduler, schedules, swa_utils
from pages import FRAMEWORKS, NEED_THE_EXTRA, ROOT, assert_trained_by_kernels, blocks, pages, script

ALONE = ["amp", "compile"]
OF_TWO = ["ddp", "fsdp", "zero"]
RUN_SCRIPT = ROOT / "tests" / "support" / "run_script.py"


def test_every_page_of_a_framework_is_run():
    assert {*ALONE, *OF_TWO, *NEED_THE_EXTRA} == set(FRAMEWORKS)


def test_readme_links_to_every_page_of_a_framework():
    links = re.findall(r"\(docs/frameworks/(\w+)\.md\)", (ROOT / "README.md").read_text())
    assert sorted(links) == sorted(FRAMEWORKS)


@pytest.mark.parametrize("module", [onepass, lr_scheduler, schedules, swa_utils], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module):
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    functions = [name for name in vars(module) if name.startswith("get_")]
    named = {*re.findall(r":: onepass\.(?:\w+\.)*(\w+)", text), *re.findall(r"`(?:onepass\.)?(\w+)`", text)}
    assert {*module.__all__, *functions} <= named


@pytest.mark.parametrize(("folder", "page"), [("cpu", "kernels"), ("cuda", "cuda"), ("bindings", "bindings")])
def test_the_page_of_a_folder_has_each_of_its_files(folder, page):
    """In the first column of its table, with or without the suffix."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "design" / f"{page}.md").read_text(), re.M)
    named = {name.split(".")[0] for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    assert {path.stem for path in (ROOT / "csrc" / folder).iterdir()} <= named


@pytest.mark.parametrize("page", [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    """And to headings of them, where a link names one."""
    for target, anchor in re.findall(r"\]\(([^)#:]+)(?:#([\w-]+))?\)", page.read_text()):
        found = page.parent / target
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", pages())
def test_the_blocks_of_a_page_run(name, tmp_path, monkeypatch):
    """In their order, as one script."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # the models are small: a second thread only waits
    names = {"__name__": "__main__"}
    for block in blocks(pages()[name]):
        exec(compile(block, name, "exec"), names)


@pytest.mark.parametrize("name", pages())
def test_blocks_are_formatted_as_the_rest(name, tmp_path):
    """Each is a file; names come from the blocks before it."""
    for index, block in enumerate(blocks(pages()[name])):
        (tmp_path / f"block{index}.py").write_text(block)
    config = "--config", ROOT / "pyproject.toml"
    run("-m", "ruff", "format", "--check", *config, tmp_path, cwd=tmp_path)
    run("-m", "ruff", "check", "--ignore", "D,F821", *config, tmp_path, cwd=tmp_path)


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
    started = run(*torchrun, RUN_SCRIPT, script(name, tmp_path), cwd=tmp_path)
    assert_trained_by_kernels(started, processes=2)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_script_is_formatted_as_the_rest(name, tmp_path):
    config = "--config", ROOT / "pyproject.toml"
    run("-m", "ruff", "format", "--check", *config, script(name, tmp_path), cwd=tmp_path)
    run("-m", "ruff", "check", "--ignore", "D", *config, script(name, tmp_path), cwd=tmp_path)
