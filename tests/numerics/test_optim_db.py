"""torch's own table of cases, which its test suite is driven from, as a further source of inputs and of errors."""

import re

import onepass
import pytest
import torch
from cases import ROWS, copies, give, gradients, model
from contract import assert_close, leaves, snapshot, torch_path, train
from reference import only_kernels, params_of
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

pytestmark = pytest.mark.usefixtures("one_thread")

KNOWN = [(row, info) for row in ROWS for info in optim_db if info.optim_cls is row.theirs]

# Which of torch's implementations is meant makes no difference to ours. "cuda" adds inputs with capturable=True, which
# torch refuses on the CPU; nothing is put on a GPU.
IMPLEMENTATION = ("foreach", "fused", "capturable")
INPUTS = [
    pytest.param(row, case.kwargs, id=f"{row.name}-{device}-{index}")
    for row, info in KNOWN
    for device in ("cpu", "cuda")
    for index, case in enumerate(
        _get_optim_inputs_including_global_cliquey_kwargs(device, torch.float32, info, skip=("differentiable",))
    )
]
ERRORS = [
    pytest.param(row, error, id=f"{row.name}-{index}")
    for row, info in KNOWN
    for index, error in enumerate(info.optim_error_inputs_func("cpu", torch.float32))
]


def test_nothing_is_left_out():
    """Every optimizer that is in torch's table and has a kernel here is tested with it."""
    known = {info.optim_cls for info in optim_db}
    assert [row.name for row, _ in KNOWN] == [row.name for row in ROWS if row.theirs in known]
    assert {"SGD", "Adam", "AdamW"} <= {row.name for row, _ in KNOWN}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("row", "kwargs"), [case for case in INPUTS if case.values[0].formula])
def test_inputs(row, kwargs, dtype):
    torch.set_default_dtype(dtype)
    params = model(dtype)
    ours = row.ours(copies(params), **kwargs)
    theirs = row.theirs(copies(params), **{k: v for k, v in kwargs.items() if k not in IMPLEMENTATION})
    for step in range(1, 11):
        grads = gradients(params, step)
        for optimizer in (ours, theirs):
            give(optimizer, grads)
        with only_kernels(sum(grad is not None for grad in grads)):
            ours.step()
        theirs.step()
    # torch computes with hyperparameters that are tensors in their dtype, we in float64.
    given = [v.dtype for v in (kwargs.get("lr"), *kwargs.get("betas", ())) if isinstance(v, torch.Tensor)]
    bound = 32 * max(torch.finfo(d).eps for d in (dtype, *given))
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=bound, atol=bound)
        for name in row.states:
            assert (name in ours.state[p]) == (name in theirs.state[q])
            if name in ours.state[p]:
                torch.testing.assert_close(ours.state[p][name], theirs.state[q][name], rtol=bound, atol=bound)


@pytest.mark.parametrize(
    ("row", "kwargs"), [case for case in INPUTS if not case.values[0].formula and not case.values[0].wants_closure]
)
def test_inputs_where_elements_depend_on_each_other(row, kwargs):
    """As far as rounding goes: it is amplified there, and bounded in the tests of these classes."""
    ours = row.ours(leaves(row.shapes), **kwargs)
    theirs = row.theirs(leaves(row.shapes), **{k: v for k, v in kwargs.items() if k not in IMPLEMENTATION})
    before = onepass.stats()
    train(ours, 5)
    assert torch_path(before) == set()
    train(theirs, 5)
    assert_close(snapshot(ours), snapshot(theirs), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("row", "error"), ERRORS)
def test_errors(row, error):
    """The same exception, or warning, with the same text."""
    given = error.optimizer_error_input
    params = given.params if given.params is not None else [torch.nn.Parameter(torch.randn(2, 3))]

    def fail(kind):
        optimizer = kind(params, **given.kwargs)
        assert error.error_on is OptimizerErrorEnum.STEP_ERROR or issubclass(error.error_type, Warning)
        if error.error_on is OptimizerErrorEnum.STEP_ERROR:
            optimizer.step()

    texts = []
    for kind in (row.ours, row.theirs):
        catch = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with catch(error.error_type, match=error.error_regex) as caught:
            fail(kind)
        texts.append([str(w.message) for w in caught] if catch is pytest.warns else str(caught.value))
    assert texts[0] == texts[1]
    assert re.search(error.error_regex, str(texts[0]))
