"""Gradients of every sort, and what autograd is told of the tensors that a step reads and writes."""

import onepass
import pytest
import torch
from cases import ELEMENTWISE, ROW, ROWS, each_of_torchs, each_row, for_rows
from contract import assert_close, assert_same, give_gradients, leaves, numbers, run_both, snapshot, torch_path, train
from reference import params_of
from torch.nn import Parameter

# -- what is written, and what autograd is told ----------------------------------------------------------------------


@each_row
@pytest.mark.parametrize("flags", [{}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_gradients_are_never_written(row, flags, dtype):
    opt = row.ours(leaves(dtype=dtype), **{**row.full, **flags})
    for t in range(3):
        give_gradients(params_of(opt), t)
        grads = [p.grad for p in params_of(opt)]
        before = [(grad.clone(), grad._version) for grad in grads]
        opt.step()
        assert_same([(grad, grad._version) for grad in grads], before)
        assert all(p.grad is grad for p, grad in zip(params_of(opt), grads, strict=True))


@each_row
def test_versions_rise_where_a_parameter_is_written_and_nowhere_else(row):
    opt = row.ours(leaves(), **row.full)
    train(opt)
    params = params_of(opt)
    params[1].grad = None
    for _ in range(2):
        before = [p._version for p in params]
        opt.step()
        after = [p._version for p in params]
        assert [new > old for new, old in zip(after, before, strict=True)] == [True, False, True, True, True]


@each_row
def test_backward_through_a_value_that_a_step_has_overwritten_raises(row):
    def script(opt):
        p = params_of(opt)[1]
        train(opt)
        losses = [(p * p).sum(), (p.view(5, 1)[1:] ** 2).sum()]  # one of them saves a view
        opt.step()
        for loss in losses:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()

    run_both(row, script)


@each_row
def test_parameters_stay_leaves_without_history(row):
    def script(opt):
        params = params_of(opt)
        # Gradients that are themselves part of a graph: double backward needs them.
        loss = sum((p**3).sum() for p in params)
        for p, grad in zip(params, torch.autograd.grad(loss, params, create_graph=True), strict=True):
            p.grad = grad
        for _ in range(2):
            opt.step()
        states = [s for state in opt.state.values() for s in state.values()]
        assert not any(s.requires_grad for s in states)
        return [(p.is_leaf, p.requires_grad, p.grad_fn, p.grad.requires_grad) for p in params]

    run_both(row, script)


@each_row
def test_inference_mode(row):
    """torch makes states that only inference mode may update. Ours can be stepped inside and outside."""
    opt, plain = (row.ours(leaves(), **row.full) for _ in range(2))
    with torch.inference_mode():
        train(opt, 2)
    train(opt, 2, first=2)
    train(plain, 4)
    assert_same(snapshot(opt)["params"], snapshot(plain)["params"])


# -- gradients that are not there ------------------------------------------------------------------------------------


def states_of(opt):
    """Which parameters have a state, and what is in it."""
    return [sorted(opt.state[p]) if p in opt.state else None for p in params_of(opt)]


@each_row
def test_a_late_first_gradient_brings_the_state_and_its_own_counter(row):
    def script(opt):
        params = params_of(opt)
        seen = [states_of(opt)]
        for t in range(4):
            give_gradients(params[: t + 1], t)
            opt.step()
            seen.append(states_of(opt))
        counts = [opt.state[p]["step"].item() for p in params if "step" in opt.state.get(p, ())]
        assert counts == ([4, 3, 2, 1] + [0] * row.eager if row.counts_steps else [])
        assert (params[4] in opt.state) == row.eager
        return seen, counts

    run_both(row, script)


@each_row
def test_nothing_has_a_gradient(row):
    def script(opt):
        before = snapshot(opt)
        assert opt.step(lambda: 3.0) == 3.0
        assert_same(snapshot(opt), before)
        return states_of(opt)

    run_both(row, script)


@each_row
def test_freezing_and_unfreezing(row):
    def script(opt):
        params = params_of(opt)
        counts = []

        def backward():
            opt.zero_grad()
            sum((p**2).sum() for p in params).backward()
            opt.step()
            counts.append([p.grad is None for p in params])

        backward()
        params[1].requires_grad_(False)
        params[2].requires_grad_(False)
        backward()
        backward()
        params[2].requires_grad_(True)
        backward()
        # What counts is the gradient, as in torch: a frozen parameter that still has one is stepped.
        params[3].requires_grad_(False)
        opt.step()
        return counts

    run_both(row, script)


@each_row
def test_tensors_that_never_require_grad(row):
    def script(opt):
        opt.add_param_group({"params": [torch.linspace(0, 1, 4, dtype=torch.float64)]})
        train(opt, 2)

    run_both(row, script)


@each_of_torchs
def test_a_gradient_of_zeros_without_memory(row):
    """Such as autograd itself makes; torch's operations know it."""

    def script(opt):
        for t in range(3):
            give_gradients(params_of(opt), t)
            params_of(opt)[1].grad = torch._efficientzerotensor((5,), dtype=torch.float64)
            opt.step()

    run_both(row, script, path={"gradient without strided memory"})


@each_row
def test_a_state_whose_memory_has_gone(row):
    opt = row.ours(leaves(), **row.full)
    train(opt)
    p = params_of(opt)[1]
    state = next(iter(x for x in opt.state[p].values() if isinstance(x, torch.Tensor) and x.ndim))
    state.untyped_storage().resize_(0)
    before = [p.detach().clone() for p in params_of(opt)]
    give_gradients(params_of(opt), 1)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 .* has no strided memory"):
        opt.step()
    assert_same([p.detach() for p in params_of(opt)], before)


@each_row
def test_gradients_set_to_zero_still_count(row):
    def script(opt):
        train(opt, 2)
        opt.zero_grad(set_to_none=False)
        opt.step()
        opt.zero_grad()
        opt.step()

    run_both(row, script)


# -- how a gradient lies in memory -----------------------------------------------------------------------------------


# A (6, 4) matrix in many ways: as parameter, as gradient, and any of one beside any of the other.
WAYS = {
    "packed": lambda: numbers(6, 4),
    "transposed": lambda: numbers(4, 6).t(),
    "sliced rows": lambda: numbers(12, 4)[::2],
    "sliced columns": lambda: numbers(6, 9)[:, 1::2],
    "inner block": lambda: numbers(8, 9)[1:7, 3:7],
    "odd offset": lambda: numbers(25)[1:].view(6, 4),
}
READ_ONLY_WAYS = {
    "expanded scalar": lambda: numbers(1).expand(6, 4),
    "expanded row": lambda: numbers(1, 4).expand(6, 4),
    "expanded column": lambda: numbers(6, 1).expand(6, 4),
    "overlapping windows": lambda: numbers(9).as_strided((6, 4), (1, 1)),
    "negated view": lambda: torch._neg_view(numbers(6, 4)),
    "imaginary part of a conjugate": lambda: numbers(6, 4, dtype=torch.complex128).conj().imag,
    "not a leaf": lambda: Parameter(numbers(6, 4)) * 2,
}


@pytest.mark.parametrize("grad", [*WAYS, *READ_ONLY_WAYS])
@pytest.mark.parametrize("param", WAYS)
@pytest.mark.usefixtures("in_float64")
@each_row
def test_strides(row, param, grad):
    ends = []
    for cls in (row.ours, row.theirs):
        p, packed = Parameter(WAYS[param]()), Parameter(numbers(3))
        opt = cls([packed, p], **row.full)
        before = onepass.stats()
        for _ in range(2):
            packed.grad, p.grad = numbers(3), {**WAYS, **READ_ONLY_WAYS}[grad]()
            copy = p.grad.clone()
            opt.step()
            assert_same(p.grad, copy)
        assert torch_path(before) == set()
        # All of the memory that the parameter is a view of: what lies between its elements must stay.
        memory = torch.empty(0, dtype=p.dtype).set_(p.data.untyped_storage())
        ends.append((snapshot(opt), memory, [s.stride() for s in opt.state[p].values()]))
    assert_close(*ends)


FOUR_D = {
    "channels last": lambda: numbers(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "permuted": lambda: numbers(5, 4, 2, 3).permute(2, 3, 1, 0),
    "packed": lambda: numbers(2, 3, 4, 5),
    "a dimension of one": lambda: numbers(2, 3, 4, 1).expand(2, 3, 4, 5),
}


@pytest.mark.parametrize("grad", FOUR_D)
@pytest.mark.parametrize("param", list(FOUR_D)[:3])
@each_row
def test_strides_in_four_dimensions(row, param, grad):
    def script(opt):
        opt.add_param_group({"params": [Parameter(FOUR_D[param]())]})
        p = params_of(opt)[1]
        for _ in range(2):
            p.grad = FOUR_D[grad]()
            opt.step()
        return [(p.stride(), s.stride()) for s in opt.state[p].values()]

    run_both(row, script, shapes=[(3,)])


# -- numbers that are not what lies in memory ------------------------------------------------------------------------


@each_row
def test_complex_beside_real(row):
    def script(opt):
        opt.add_param_group({"params": leaves([(3,), (), (2, 3)], torch.complex128, seed=3)})
        train(opt, 3)

    run_both(row, script)


@each_row
def test_a_conjugated_gradient(row):
    """A lazy conjugate; torch's Adam refuses it, so it is resolved for the stock classes."""

    def script(opt):
        (p,) = params_of(opt)
        for t in range(3):
            give_gradients([p], t)
            p.grad = p.grad.conj() if isinstance(opt, row.ours) else p.grad.conj().resolve_conj()
            assert p.grad.is_conj() == isinstance(opt, row.ours)
            opt.step()

    run_both(row, script, shapes=[(2, 3)], dtype=torch.complex128)


NEGATED = {
    "from the start": lambda p, opt: torch._neg_view(torch.linspace(-1, 1, 5, dtype=torch.float64)),
    "later": lambda p, opt: train(opt, 2) or torch._neg_view(torch.linspace(-1, 1, 5, dtype=torch.float64)),
}


@pytest.mark.parametrize("when", NEGATED)
@each_row
def test_a_negated_parameter(row, when):
    """Only the view is negated: the step has to change the memory below the other way round."""

    def script(opt):
        p = params_of(opt)[1]
        p.data = NEGATED[when](p, opt)
        train(opt, 2, first=2)
        assert p.is_neg()

    run_both(row, script, path={"negated or conjugated parameter"})


@for_rows([ROW["SGD"], ROW["Lion"]])  # torch's others refuse it
@pytest.mark.parametrize("late", [False, True])
def test_a_conjugated_parameter(row, late):
    def script(opt):
        p = params_of(opt)[0]
        if late:
            train(opt, 2)
        below = numbers(5, dtype=torch.complex128)
        p.data = below.conj()
        train(opt, 2, first=2)
        assert p.is_conj()
        assert_same(p.detach(), below.conj())

    run_both(row, script, shapes=[(5,), (2,)], dtype=torch.complex128, path={"negated or conjugated parameter"})


@each_row
def test_a_negated_state(row):
    def script(opt):
        train(opt, 2)
        state = opt.state[params_of(opt)[2]]
        name = row.states[0]
        state[name].data = torch._neg_view(-state[name])
        train(opt, 2, first=2)

    run_both(row, script, path={"negated or conjugated state"})


# -- sparse ----------------------------------------------------------------------------------------------------------


def sparse(t=0):
    """Uncoalesced: row 1 has two entries."""
    values = torch.arange(6.0, dtype=torch.float64).reshape(3, 2) + t
    return torch.sparse_coo_tensor([[1, 0, 1]], values, (4, 2), check_invariants=True)


SPARSE_OPTIONS = [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}, {"maximize": True}]
SPARSE = [(row, o) for row in ELEMENTWISE if row.sparse == "both" for o in SPARSE_OPTIONS if row.takes(o)]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize(("row", "options"), SPARSE)
def test_sparse_gradients_are_taken_as_torch_does(row, options):
    def script(opt):
        params = params_of(opt)
        for t in range(3):
            give_gradients(params, t)
            params[1].grad = sparse(t)
            opt.step()
            assert not params[1].grad.is_coalesced()
            assert params[1].grad._nnz() == 3

    plain = row.having(momentum=0, nesterov=False, weight_decay=0)
    path = {"sparse gradient"} if "momentum" in options else set()  # a buffer is dense, and torch's
    run_both(row, script, shapes=[(3,), (4, 2), (5,)], path=path, **{**plain, **options})


@for_rows(row for row in ELEMENTWISE if row.sparse == "neither")
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("group", [0, 1])
def test_sparse_gradients_are_refused_in_torchs_words_and_nothing_is_written(row, steps, group):
    opt = row.ours([{"params": leaves([(3,), (4, 2)])}, {"params": leaves([(5,), (4, 2)])}])
    train(opt, steps)
    before = snapshot(opt)
    give_gradients(params_of(opt), steps)
    victim = opt.param_groups[group]["params"][1]
    victim.grad = sparse()
    with pytest.raises(RuntimeError) as ours:
        opt.step()
    stock = row.theirs([victim])
    with pytest.raises(RuntimeError, match="does not support sparse gradients") as torchs:
        stock.step()
    assert str(ours.value) == str(torchs.value)
    assert_same(snapshot(opt), before)


@pytest.mark.parametrize("steps", [0, 2])
def test_when_torchs_code_fails_nothing_is_left_behind(steps):
    """torch cannot add a weight decay to a sparse gradient, and finds that out in the middle of the step."""
    opt, plain = (onepass.SGD(leaves([(3,), (4, 2)]), lr=0.1, momentum=0.9, weight_decay=0.1) for _ in range(2))
    train(opt, steps)
    before = snapshot(opt)
    give_gradients(params_of(opt), steps)
    params_of(opt)[1].grad = sparse()
    with pytest.raises(RuntimeError):
        opt.step()
    after = snapshot(opt)
    assert_same([after["params"], after["state"][0]], [before["params"], before["state"][0]])
    # And it goes on as if nothing had happened.
    train(opt, 2, first=steps)
    train(plain, steps + 2)
    assert_same(snapshot(opt), snapshot(plain))


# -- meta ------------------------------------------------------------------------------------------------------------


LOOK_AT_VALUES = ["ASGD", "Adafactor", "Rprop"]  # in torch's code, which raises


@for_rows(row for row in ROWS if not (row.wants_sparse or row.wants_closure or row.name in LOOK_AT_VALUES))
def test_meta_parameters_are_stepped_in_their_shapes_only(row):
    """By torch's code."""

    def form(opt):
        return [(p.device.type, p.shape, p.dtype) for p in params_of(opt)], [
            [(name, state.device.type, state.shape, state.dtype) for name, state in opt.state[p].items()]
            for p in params_of(opt)
        ]

    opts = [
        cls([Parameter(p.detach().to("meta")) for p in leaves(row.shapes)], **row.full)
        for cls in (row.ours, row.theirs)
    ]
    for opt in opts:
        opt.step()  # no gradients yet: nothing to do
        for p in params_of(opt):
            p.grad = torch.empty_like(p)
    before = onepass.stats()
    for opt in opts:
        opt.step()
    assert torch_path(before) == {"device meta"}
    assert form(opts[0]) == form(opts[1])
