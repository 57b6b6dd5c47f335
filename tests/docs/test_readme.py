"""What README says and the package knows better."""

import inspect
import re
from pathlib import Path

import onepass
import torch
from cases import ROWS
from onepass.training import catalog

README = Path(__file__).parents[2] / "README.md"
TABLE = r"<!-- python -m onepass info --optimizers -->\n(.*?)\n<!-- end -->"


def test_the_table_of_optimizers_is_the_registrys():
    """Between its marks stands what the command in the first of them prints."""
    assert re.findall(TABLE, README.read_text(), re.S) == [catalog.markdown()]


def test_an_extra_does_not_compile_onepass_again():
    """`pip install '.[EXTRA]'` does: so only the first installation is of the source."""
    assert re.findall(r"pip install [^`\n]*'(\.\[\w+\])'", README.read_text()) == [".[demo]", ".[EXTRA]"]


def test_the_table_has_every_optimizer():
    torchs = {name for name in torch.optim.__all__ if inspect.isclass(getattr(torch.optim, name))}
    listed = {found.__name__ for found in catalog.optimizers()}
    assert listed == torchs - {"Optimizer"} | {row.name for row in ROWS if not hasattr(torch.optim, row.name)}
    assert all(getattr(onepass, name).__module__ == "onepass" for name in listed)
