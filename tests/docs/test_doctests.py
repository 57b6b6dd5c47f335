"""The examples in docstrings: every public class and function has one, and it runs."""

import doctest
import inspect

import numpy as np
import onepass
import pytest
import torch
from onepass import lr_scheduler, schedules, swa_utils


def documented_here(module):
    """The public classes and functions of a module with a docstring of onepass; torch's keep torch's."""
    names = {*module.__all__, *(name for name in vars(module) if name.startswith("get_"))}
    for name in sorted(names):
        found = getattr(module, name)
        if inspect.isclass(found) or inspect.isfunction(found):
            of_torch = getattr(torch.optim, name, None) or getattr(torch.optim.lr_scheduler, name, None)
            of_torch = of_torch or getattr(torch.optim.swa_utils, name, None)
            if of_torch is None or found.__doc__ != of_torch.__doc__:
                yield f"{module.__name__}.{name}", found


PUBLIC = dict(found for module in (onepass, lr_scheduler, schedules, swa_utils) for found in documented_here(module))


def test_nothing_is_missing():
    assert {"onepass.AdamW", "onepass.lr_find", "onepass.lr_scheduler.get_scheduler"} <= set(PUBLIC)
    assert {"onepass.lr_scheduler.SWALR", "onepass.lr_scheduler.StepLR", "onepass.schedules.cosine"} <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name, tmp_path):
    available = {"np": np, "onepass": onepass, "torch": torch, "folder": tmp_path}
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(PUBLIC[name]), available, name, None, None)
    assert test.examples, f"{name} has no example"
    failures = []
    runner = doctest.DocTestRunner()
    runner.run(test, out=failures.append)
    assert not failures, "".join(failures)
