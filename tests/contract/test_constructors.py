"""The constructors, which are torch's with arguments of ours: what they take, and what tools see of them."""

import inspect
import json
import os
import pydoc
import subprocess
import sys
from pathlib import Path

import onepass
import pytest
import signatures
import torch
from cases import OWN, ROWS, for_rows
from contract import assert_same, leaves, snapshot, train
from onepass.optimizers.base import Native

DERIVED = [row for row in ROWS if issubclass(row.ours, Native) and issubclass(row.ours, row.theirs)]


@for_rows(DERIVED)
def test_the_signature_is_torchs_and_ours_behind_it(row):
    ours, theirs = (inspect.signature(cls).parameters for cls in (row.ours, row.theirs))
    own = {name: parameter for name, parameter in ours.items() if name not in theirs}
    assert list(ours) == [*theirs, *own]
    assert {name: ours[name] for name in theirs} == dict(theirs)
    assert {name: parameter.default for name, parameter in own.items()} == row.own
    assert {parameter.kind for parameter in own.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert list(inspect.signature(row.ours.__init__).parameters) == ["self", *ours]


@for_rows(DERIVED)
def test_help_shows_every_argument(row):
    text = pydoc.render_doc(row.ours, renderer=pydoc.plaintext)
    head = text[: text.index("Method resolution order")]
    for name in inspect.signature(row.ours).parameters:
        assert f"{name}:" in head, name


def test_an_argument_that_torch_will_have_passes_through():
    class Theirs(torch.optim.AdamW):
        def __init__(self, params, lr=1e-3, *, new_in_torch=1, **kwargs):
            super().__init__(params, lr, **kwargs)
            self.seen = new_in_torch

    class Ours(Native, Theirs):
        rule = "adam"
        torch_step = onepass.AdamW.torch_step

    assert list(inspect.signature(Ours).parameters) == ["params", "lr", "new_in_torch", *OWN, "kwargs"]
    opt = Ours(leaves(), new_in_torch=5, weight_decay=0.1, state_dtype=torch.float64)
    plain = onepass.AdamW(leaves(), weight_decay=0.1, state_dtype=torch.float64)
    assert opt.seen == 5
    for each in (opt, plain):
        train(each, 2)
    assert_same(snapshot(opt), snapshot(plain))


def test_a_subclass_may_have_a_constructor_of_its_own():
    class Mine(onepass.AdamW):
        def __init__(self, params, mine):
            super().__init__(params, lr=0.5, state_dtype=torch.bfloat16)
            self.mine = mine

    assert list(inspect.signature(Mine).parameters) == ["params", "mine"]
    opt = Mine(leaves(), 3)
    assert (opt.mine, opt.defaults["lr"], opt.defaults["state_dtype"]) == (3, 0.5, torch.bfloat16)


# -- type checkers -----------------------------------------------------------------------------------------------------


def test_the_signatures_for_type_checkers_are_those_of_the_classes():
    if signatures.RELEASE in signatures.FILE.read_text().splitlines()[0]:  # other releases have other arguments
        assert signatures.FILE.read_text() == signatures.stub()


GOOD = """import onepass, torch
params = [torch.nn.Parameter(torch.ones(2))]
"""
BAD_ARGUMENTS = {"no_such_argument": "1", "state_dtype": "'bfloat16'", "lr": "[1e-3]"}


def calls():
    """Code with a good call of every class, then three bad ones, each on a line of its own; and the bad lines."""
    lines = GOOD.splitlines()
    bad = set()
    for row in DERIVED:
        lines.append(f"onepass.{row.name}(params, lr=1e-3, maximize=True, state_dtype=torch.bfloat16)")
        if row.takes_matrices:
            lines[-1] = lines[-1].replace("maximize", "nesterov")
        for name, value in BAD_ARGUMENTS.items():
            lines.append(f"onepass.{row.name}(params, {name}={value})")
            bad.add(len(lines))
    return "\n".join(lines) + "\n", bad


def environment():
    """Where type checkers find the package that is tested."""
    folder = str(Path(onepass.__file__).parents[1])
    return {**os.environ, "MYPYPATH": "" if "site-packages" in folder else folder}, folder


@pytest.mark.slow
def test_mypy_sees_every_argument(tmp_path):
    code, bad = calls()
    (tmp_path / "calls.py").write_text(code)
    env, _ = environment()
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "calls.py"]
    told = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False).stdout
    errors = [line for line in told.splitlines() if ": error: " in line]
    assert {int(line.split(":")[1]) for line in errors} == bad, told


def test_pyright_sees_every_argument(tmp_path):
    code, bad = calls()
    (tmp_path / "calls.py").write_text(code)
    env, folder = environment()
    settings = {"typeCheckingMode": "standard", "extraPaths": [folder]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "calls.py"]
    told = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False).stdout
    found = [each for each in json.loads(told)["generalDiagnostics"] if each["severity"] == "error"]
    assert {each["range"]["start"]["line"] + 1 for each in found} == bad, told
