"""Runs the scripts of docs/ that need the extra, in this process: conftest.py has imported torchvision."""

import runpy

import onepass
import pytest
from pages import NEED_THE_EXTRA, assert_trained_by_kernels, script


@pytest.mark.parametrize("name", sorted(NEED_THE_EXTRA))
def test_a_script(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = onepass.stats()
    runpy.run_path(str(script(name, tmp_path)), run_name="__main__")
    assert sum(onepass.stats()["kernel"].values()) > sum(before["kernel"].values())
    assert_trained_by_kernels(capsys.readouterr().out, torchs=before["torch"])
