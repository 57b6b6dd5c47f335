"""The site of onepass's documentation.

python -m sphinx -W --keep-going -b html docs build/docs
"""

from __future__ import annotations

import re

import onepass
from sphinx.application import Sphinx

project = "onepass"
author = "the authors of onepass"
version = release = onepass.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # the types would hide the arguments in signatures as long as torch's
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False

nitpicky = True  # a reference to a name of onepass that does not exist is a warning
nitpick_ignore_regex = [("py:.*", r"(torch|matplotlib)\..*|fnmatch|Floats")]

html_theme = "furo"
html_title = f"onepass {release}"

TORCH_REFERENCE = re.compile(r":class:`(torch\.optim\.lr_scheduler\.\w+)`")
TORCH_LINK = r"`\1 <https://docs.pytorch.org/docs/stable/generated/\1.html>`__"


def link_to_torch(app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """Replace references to torch's schedulers by links to torch's site."""
    lines[:] = [TORCH_REFERENCE.sub(TORCH_LINK, line) for line in lines]


def setup(app: Sphinx) -> None:
    """Connect the function that changes docstrings."""
    app.connect("autodoc-process-docstring", link_to_torch)
