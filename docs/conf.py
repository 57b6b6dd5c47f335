"""The site of onepass's documentation.

python -m sphinx -W --keep-going -b html docs build/docs
"""

from __future__ import annotations

import inspect

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

TORCHS = "https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.{}.html"


def link_to_torch(app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """Replace a docstring that is torch's by a link: it refers to pictures and names of torch's own site."""
    if inspect.isclass(found) and any(base.__doc__ == found.__doc__ for base in found.__mro__[1:]):
        lines[:] = [f"The arguments are described in `torch's documentation <{TORCHS.format(found.__name__)}>`__."]


def setup(app: Sphinx) -> None:
    """Connect the function that changes docstrings."""
    app.connect("autodoc-process-docstring", link_to_torch)
