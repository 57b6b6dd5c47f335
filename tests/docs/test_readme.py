"""What README says and the package knows better."""

import inspect
import re
from pathlib import Path

import onepass
import platforms
import torch
from cases import ROWS
from onepass.training import catalog

README = Path(__file__).parents[2] / "README.md"
PYPROJECT = README.parent / "pyproject.toml"
TABLE = r"<!-- python -m onepass info --optimizers -->\n(.*?)\n<!-- end -->"


def test_the_table_of_optimizers_is_the_registrys():
    """Between its marks stands what the command in the first of them prints."""
    assert re.findall(TABLE, README.read_text(), re.S) == [catalog.markdown()]


def test_the_table_of_platforms_has_what_the_scripts_that_test_them_have_recorded():
    marks = r"<!-- python tests/support/platforms.py table -->\n(.*?)\n<!-- end -->"
    assert re.findall(marks, README.read_text(), re.S) == [platforms.table(platforms.read())]


def test_a_record_replaces_that_of_the_same_platform_and_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(platforms, "RECORDS", tmp_path / "platforms.json")
    platforms.write([])
    new = platforms.of_this_python("tests/versions", "emulated")
    platforms.record({**new, "torch": "2.9.1"})
    platforms.record({**new, "torch": "2.10.0"})
    platforms.record({**new, "torch": "2.9.1"})
    platforms.record({"platform": "CUDA", "script": "gpu.sh", "python": "", "torch": ""})
    assert [each["torch"] for each in platforms.read()] == ["2.9.1", "2.10.0", ""]
    python = f"on Python {new['python']}"
    assert platforms.table(platforms.read()).splitlines()[2:] == [
        f"| {new['platform']} | `tests/versions` (torch 2.9.1 {python}, torch 2.10.0 {python}) |",
        "| CUDA | `gpu.sh` |",
    ]
    assert new["platform"].startswith("Linux, ")
    assert new["platform"].endswith(", emulated")


def test_the_package_of_the_cuda_kernels_has_the_version_of_onepass():
    own, kernels = (path.read_text() for path in (PYPROJECT, README.parent / "cuda" / "pyproject.toml"))
    (version,) = re.findall(r'^version = "(.+?)"', own, re.M)
    assert re.findall(r'^version = "(.+?)"', kernels, re.M) == [version]
    assert f'dependencies = ["onepass=={version}"]' in kernels


def test_the_description_of_the_package_is_part_of_readme():
    """But not README itself, whose links are relative to the repository."""
    (text,) = re.findall(r'^\[project.readme\]\n.*?"""\n(.*?)"""', PYPROJECT.read_text(), re.M | re.S)
    assert "](" not in text
    for paragraph in text.strip().split("\n\n"):
        assert paragraph in README.read_text()


def test_an_extra_does_not_compile_onepass_again():
    """`pip install '.[EXTRA]'` does: so only the first installation is of the source."""
    assert re.findall(r"pip install [^`\n]*'(\.\[\w+\])'", README.read_text()) == [".[demo]", ".[EXTRA]"]


def test_the_table_has_every_optimizer():
    torchs = {name for name in torch.optim.__all__ if inspect.isclass(getattr(torch.optim, name))}
    listed = {found.__name__ for found in catalog.optimizers()}
    assert listed == torchs - {"Optimizer"} | {row.name for row in ROWS if not hasattr(torch.optim, row.name)}
    assert all(getattr(onepass, name).__module__ == "onepass" for name in listed)
