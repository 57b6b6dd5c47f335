"""Sparse gradients: SparseAdam, and the classes that take them beside dense ones."""

import copy
import dataclasses
import io
import itertools
import re
import warnings

import numpy as np
import onepass
import pytest
import reference
import torch
from cases import ROW, ROWS, copies
from reference import ROUNDING, Trajectory, bits, checked_step, only_kernels, params_of, real, touched
from torch import Tensor
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import optim_db

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),  # within torch's own steps
]

# -- the table -------------------------------------------------------------------------------------------------------

# The table's tests give dense gradients to every row that has a formula.
SPARSE_ADAM = dataclasses.replace(ROW["SparseAdam"], formula=reference.sparse_adam)
TAKING = [row for row in ROWS if row.formula and row.sparse != "neither"] + [SPARSE_ADAM]


def takes_sparse(row, kwargs) -> bool:
    """Whether kernels take sparse gradients with these arguments. A row with "ours" takes them with all arguments
    but `cautious`.

    torch's SGD keeps a sparse momentum buffer; coupled decay would make the gradient dense.
    """
    if kwargs.get("cautious") or row.sparse == "ours":
        return not kwargs.get("cautious")
    coupled = kwargs.get("weight_decay", 0) != 0 and not kwargs.get("decoupled_weight_decay")
    return kwargs.get("momentum", 0) == 0 and not coupled


def cases(rows, own=True):
    every = [(row, name, kw) for row in rows for name, kw in (row.variants | (row.own_variants if own else {})).items()]
    return [pytest.param(row, kw, id=f"{row.name}-{name}") for row, name, kw in every if takes_sparse(row, kw)]


each_case = pytest.mark.parametrize(("row", "kwargs"), cases(TAKING))
torchs_cases = pytest.mark.parametrize(("row", "kwargs"), cases((r for r in TAKING if r.sparse == "both"), own=False))
FULL = {row.name: row.full for row in TAKING} | {  # kernels do not take sparse gradients with `full` of these two
    "SGD": {"lr": 0.1, "maximize": True},
    "Adagrad": {**ROW["Adagrad"].full, "decoupled_weight_decay": True},
}
each_row = pytest.mark.parametrize("row", TAKING)
each_of_torchs = pytest.mark.parametrize("row", [row for row in TAKING if row.sparse == "both"])


def test_the_cases_are_those_that_the_kernels_take():
    assert {case.values[0].name for case in cases(TAKING)} == set(FULL)
    assert len(cases(TAKING)) > 40


# -- gradients -------------------------------------------------------------------------------------------------------

KINDS = ("coalesced", "unsorted", "duplicates")


def sparse(p: Tensor, sparse_dim: int, kind: str = "duplicates", part: float = 0.6, exact: bool = True) -> Tensor:
    """A gradient for some of the rows. Numbers of a few bits are added up without an error."""
    sizes = p.shape[:sparse_dim]
    rows = sizes.numel()
    count = round(part * rows)
    numbers = torch.randint(rows, (count,)) if kind == "duplicates" and rows else torch.randperm(rows)[:count]
    indices = (
        torch.stack(torch.unravel_index(numbers, sizes)) if count else torch.zeros(sparse_dim, 0, dtype=torch.long)
    )
    shape = (count, *p.shape[sparse_dim:])
    values = torch.randint(-96, 97, shape) / 64 if exact else torch.randn(shape, dtype=torch.float64)
    grad = torch.sparse_coo_tensor(indices, values.to(p.dtype), p.shape, check_invariants=True)
    return grad.coalesce() if kind == "coalesced" else grad


# Shape and number of sparse dimensions. Rows of 1, 2, 3, 17, 64 and 1000 elements; no rows, and rows of no elements.
TABLES = [
    ((50, 64), 1),
    ((300, 1), 1),
    ((40, 2), 1),
    ((100, 3), 1),
    ((20, 17), 1),
    ((9, 1000), 1),
    ((30, 4, 5), 1),
    ((6, 7, 8), 2),
    ((5, 4, 3), 3),
    ((31,), 1),
    ((11, 13), 2),
    ((0, 5), 1),
    ((7, 0), 1),
    ((1, 1), 1),
]


def tables(dtype=torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape, _ in TABLES]


def sparse_gradients(params: list[Tensor], step: int, **how) -> list[Tensor]:
    return [
        sparse(p, dims, KINDS[(step + i) % 3], **how)
        for i, (p, (_, dims)) in enumerate(zip(params, TABLES, strict=True))
    ]


def give(optimizer, grads) -> None:
    for p, grad in zip(params_of(optimizer), grads, strict=True):
        p.grad = grad


def everything(row, optimizer) -> list:
    """Bits of all parameters and states, and the step counters."""
    held = []
    for p in params_of(optimizer):
        state = optimizer.state.get(p, {})
        held += [bits(p), state["step"] + 0 if "step" in state else None] + [
            bits(state[name]) for name in row.states if name in state
        ]
    return held


def untouched_bits(row, optimizer) -> list[bytes]:
    """Of every element of parameters and states that the gradients have no entry for."""
    held = []
    for p in params_of(optimizer):
        rest = torch.from_numpy(~touched(p.grad))
        tensors = [p.detach(), *(t for name, t in optimizer.state.get(p, {}).items() if name in row.states)]
        held += [bits(t[rest]) for t in tensors]
    return held


# -- one step, against the formula -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_case
def test_every_element_of_every_step(row, kwargs, dtype):
    """Those that are touched follow the formula, the others keep their bits."""
    ours = row.ours(tables(dtype), **kwargs)
    for step in range(1, 5):
        give(ours, sparse_gradients(params_of(ours), step))
        before = untouched_bits(row, ours) if step > 1 else None
        checked_step(row, ours)
        assert before is None or untouched_bits(row, ours) == before
    assert all(bits(p) != bits(q) for p, q in zip(params_of(ours), tables(dtype), strict=True) if p.numel() > 1)


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@each_row
def test_every_mix_of_dtypes(row, dtype, state_dtype):
    ours = row.ours(tables(dtype), **FULL[row.name], state_dtype=state_dtype)
    for step in range(1, 4):
        give(ours, sparse_gradients(params_of(ours), step))
        checked_step(row, ours)
    for p in params_of(ours):
        assert all(ours.state[p][name].dtype == (state_dtype or dtype) for name in row.states if name in ours.state[p])


@pytest.mark.parametrize("row", [row for row in TAKING if row is not SPARSE_ADAM])
def test_dense_and_sparse_gradients_in_turn(row):
    """One counter, one state: a dense gradient goes on where a sparse one has stopped."""
    ours = row.ours(tables(), **FULL[row.name])
    for step in range(1, 8):
        grads = sparse_gradients(params_of(ours), step)
        give(ours, [g.to_dense() if (step + i) % 3 == 0 else g for i, g in enumerate(grads)])
        checked_step(row, ours)
        assert not row.counts_steps or all(ours.state[p]["step"] == step for p in params_of(ours))


@pytest.mark.parametrize("row", [row for row in TAKING if row is not SPARSE_ADAM])
def test_a_step_of_rows_is_the_step_of_a_table_of_these_rows(row):
    """To the bit."""
    whole = torch.randn(40, 33)
    rows = torch.tensor([3, 4, 17, 39])
    ours = row.ours([whole.clone().requires_grad_()], **FULL[row.name])
    part = row.ours([whole[rows].clone().requires_grad_()], **FULL[row.name])
    for _ in range(5):
        values = torch.randn(4, 33)
        give(ours, [torch.sparse_coo_tensor(rows[None], values, (40, 33), check_invariants=True)])
        give(part, [values])
        ours.step()
        part.step()
    (p,), (q,) = params_of(ours), params_of(part)
    assert bits(p[rows]) == bits(q)
    for name in row.states:
        if name in part.state[q]:
            assert bits(ours.state[p][name][rows]) == bits(part.state[q][name])


# -- many steps, against torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torchs_cases
def test_never_farther_from_the_formula_than_torch(row, kwargs, dtype):
    torch.set_default_dtype(dtype)  # for torch's step counters
    params = tables(dtype)
    ours, theirs = row.ours(copies(params), **kwargs), row.theirs(copies(params), **kwargs)
    exact = Trajectory(row, ours)
    for step in range(1, 101):
        grads = sparse_gradients(params, step, exact=False)
        for optimizer in (ours, theirs):
            give(optimizer, grads)
        with only_kernels(len(params)):
            ours.step()
        theirs.step()
        exact.step()
    for name in exact.names():
        want = exact.numbers(name)
        ulp = 2 * ROUNDING[dtype] * abs(want).max()
        mine, torchs = (exact.of(optimizer, name) - want for optimizer in (ours, theirs))
        assert abs(mine).max() <= 1.1 * abs(torchs).max() + 4 * ulp, name
        assert np.sqrt((mine**2).mean()) <= 1.1 * np.sqrt((torchs**2).mean()) + 0.1 * ulp, name
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        assert list(ours.state[p]) == list(theirs.state[q])
        assert ours.state[p].get("step") == theirs.state[q].get("step")
        assert type(ours.state[p].get("step")) is type(theirs.state[q].get("step"))


@pytest.mark.parametrize("kwargs", [{}, {"betas": (0.3, 0.4), "maximize": True}], ids=str)
def test_not_finite(kwargs):
    """NaN, infinities and overflows spread through a row's elements as in torch, and to no neighbour."""
    numbers = [float("nan"), float("inf"), -float("inf"), 1e20, -1e20, 3e38, 1e-30, 0.0, -0.0, 1.0]
    ours, theirs = (
        cls([torch.ones(3, 10, requires_grad=True)], **kwargs) for cls in (SPARSE_ADAM.ours, SPARSE_ADAM.theirs)
    )
    for values in ([numbers, [1.0] * 10], [[1.0] * 10] * 2, [[1.0] * 10] * 2):
        grad = torch.sparse_coo_tensor([[2, 0]], torch.tensor(values), (3, 10), check_invariants=True)
        for optimizer in (ours, theirs):
            give(optimizer, [grad])
            optimizer.step()
        (p,), (q,) = params_of(ours), params_of(theirs)
        torch.testing.assert_close(p, q, equal_nan=True)
        for name in SPARSE_ADAM.states:
            torch.testing.assert_close(ours.state[p][name], theirs.state[q][name], equal_nan=True)


KNOWN = next(info for info in optim_db if info.optim_cls is torch.optim.SparseAdam)


@pytest.mark.parametrize("case", KNOWN.optim_inputs_func("cpu"), ids=lambda case: case.desc or "default")
def test_torchs_inputs(case):
    params = tables()
    ours, theirs = (cls(copies(params), **case.kwargs) for cls in (onepass.SparseAdam, torch.optim.SparseAdam))
    for step in range(1, 11):
        grads = sparse_gradients(params, step)
        for optimizer in (ours, theirs):
            give(optimizer, grads)
        with only_kernels(len(params)):
            ours.step()
        theirs.step()
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("error", KNOWN.optim_error_inputs_func("cpu", torch.float32), ids=lambda e: e.error_regex[:40])
def test_torchs_error_inputs(error):
    given = error.optimizer_error_input
    params = given.params if given.params is not None else [Parameter(torch.randn(2, 3))]
    texts = []
    for cls in (onepass.SparseAdam, torch.optim.SparseAdam):
        catch = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with catch(error.error_type, match=error.error_regex) as caught:
            cls(params, **given.kwargs)
        texts.append([str(w.message) for w in caught] if catch is pytest.warns else str(caught.value))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "kwargs", [{"lr": 0.0}, {"lr": torch.ones(2)}, {"eps": 0.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}], ids=str
)
def test_bad_hyperparameters_are_refused_in_torchs_words(kwargs):
    with pytest.raises(ValueError, match=r"Invalid|Tensor lr") as torchs:
        torch.optim.SparseAdam(tables(), **kwargs)
    with pytest.raises(ValueError, match=re.escape(str(torchs.value))):
        onepass.SparseAdam(tables(), **kwargs)


@pytest.mark.parametrize("bad", ["sparse", "complex"])
def test_sparse_and_complex_parameters_are_refused_in_torchs_words(bad):
    p = torch.eye(3).to_sparse().requires_grad_() if bad == "sparse" else torch.randn(3, dtype=torch.cfloat)
    with pytest.raises(ValueError, match=f"(?i){bad} params") as torchs:
        torch.optim.SparseAdam([torch.ones(2), p])
    with pytest.raises(ValueError, match=re.escape(str(torchs.value))):
        onepass.SparseAdam([torch.ones(2), p])


# -- gradients of every kind -----------------------------------------------------------------------------------------


@each_row
def test_entries_of_a_row_are_added_up(row):
    """Coalesced by torch or not, whatever their order, where sums are exact."""
    params = tables()
    grads = [sparse_gradients(params, 2) for _ in range(3)]
    results = []
    for how in ("as they are", "coalesced", "backwards"):
        ours = row.ours(copies(params), **FULL[row.name])
        for step in grads:
            if how == "coalesced":
                step = [g.coalesce() for g in step]
            elif how == "backwards":
                step = [
                    torch.sparse_coo_tensor(
                        g._indices().flip(1), g._values().flip(0), g.shape, check_invariants=True, is_coalesced=False
                    )
                    for g in step
                ]
            give(ours, step)
            ours.step()
        results.append(everything(row, ours))
    assert results[0] == results[1] == results[2]


def test_entries_are_added_in_the_order_in_which_they_come():
    """Those of other rows in between make no difference: 1e8 - 1e8 + 1 is not 1e8 + 1 - 1e8."""
    p = torch.zeros(3, 1)
    sums = []
    for values in ([1e8, 5.0, -1e8, 1.0], [1e8, 5.0, 1.0, -1e8]):
        ours = onepass.SGD([p.clone().requires_grad_()], lr=1.0)
        give(
            ours,
            [torch.sparse_coo_tensor([[2, 0, 2, 2]], torch.tensor(values)[:, None], (3, 1), check_invariants=True)],
        )
        ours.step()
        sums.append(params_of(ours)[0][2].item())
    assert sums == [-1.0, 0.0]


@each_row
def test_a_claim_to_be_coalesced_is_not_believed(row):
    p = torch.randn(5, 2)
    indices, values = torch.tensor([[3, 1, 3]]), torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    results = []
    for claim in (False, True):
        ours = row.ours([p.clone().requires_grad_()], **FULL[row.name])
        grad = torch.sparse_coo_tensor(indices, values, (5, 2), is_coalesced=claim, check_invariants=False)
        give(ours, [grad])
        ours.step()
        results.append(everything(row, ours))
    assert results[0] == results[1]


@each_row
def test_values_and_indices_of_any_strides(row):
    """Expanded, transposed, sliced, negated lazily."""
    p = torch.randn(9, 6)
    rows = torch.tensor([7, 2, 7, 0])
    made = {
        "expanded": torch.tensor([[0.5], [1.5], [2.0], [-1.0]]).expand(4, 6),
        "one number": torch.tensor(0.25).expand(4, 6),
        "transposed": torch.randn(6, 4).t(),
        "sliced": torch.randn(8, 12)[::2, ::2],
        "negated": torch._neg_view(torch.randn(4, 6)),
    }
    for what, values in made.items():
        results = []
        for plain in (False, True):
            ours = row.ours([p.clone().requires_grad_()], **FULL[row.name])
            indices = rows[None].clone() if plain else torch.stack([rows, rows], 1).t()[:1]
            assert plain or not indices[0].is_contiguous()
            given = values.resolve_neg().contiguous() if plain else values
            give(ours, [torch.sparse_coo_tensor(indices, given, (9, 6), check_invariants=True)])
            with only_kernels(1):
                ours.step()
            results.append(everything(row, ours))
        assert results[0] == results[1], what


@each_row
def test_no_entries(row):
    """A step is counted, and nothing else happens; states are created."""
    params = tables()
    ours = row.ours(copies(params), **FULL[row.name])
    for step in (1, 2):
        give(ours, [sparse(p, dims, part=0.0) for p, (_, dims) in zip(params, TABLES, strict=True)])
        with only_kernels(len(params)):
            ours.step()
        for p, q in zip(params, params_of(ours), strict=True):
            assert bits(p) == bits(q)
            assert ours.state[q].get("step", step) == step
            for name in row.states:
                if name in ours.state[q]:
                    assert ours.state[q][name].shape == p.shape
                    assert ours.state[q][name].unique().numel() <= 1


@each_row
def test_gradients_are_not_written(row):
    ours = row.ours(tables(), **FULL[row.name])
    grads = sparse_gradients(params_of(ours), 2)
    before = [(g.is_coalesced(), bits(g._values()), g._indices().clone(), g._values()._version) for g in grads]
    give(ours, grads)
    versions = [p._version for p in params_of(ours)]
    ours.step()
    for p, grad, (coalesced, values, indices, version), old in zip(
        params_of(ours), grads, before, versions, strict=True
    ):
        assert p.grad is grad
        assert grad.is_coalesced() == coalesced
        assert bits(grad._values()) == values
        assert torch.equal(grad._indices(), indices)
        assert grad._values()._version == version
        assert p._version > old


# -- embeddings ------------------------------------------------------------------------------------------------------


class Words(torch.nn.Module):
    """A table used twice, one with a row of padding, and one whose rows are averaged in bags."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(50, 16, sparse=sparse)
        self.padded = torch.nn.Embedding(30, 16, padding_idx=3, sparse=sparse)
        self.bags = torch.nn.EmbeddingBag(40, 16, mode="mean", sparse=sparse)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.words(x % 50).mean(1), self.words((x * 7) % 50).sum(1)
        return ((first * second + self.padded(x % 30).sum(1) - self.bags(x % 40)) ** 2).mean()


@each_of_torchs
def test_embeddings(row):
    results = []
    kwargs = {"lr": 0.05}
    for cls in (row.ours, row.theirs):
        torch.manual_seed(3)
        model = Words(sparse=True)
        optimizer = cls(model.parameters(), **kwargs)
        losses = []
        for _ in range(20):
            x = torch.randint(0, 200, (8, 5))
            optimizer.zero_grad()
            loss = model(x)
            loss.backward()
            assert all(p.grad.is_sparse for p in model.parameters())
            with only_kernels(3) if cls is row.ours else warnings.catch_warnings():
                optimizer.step()
            losses.append(loss.item())
        assert not model.padded.weight[3].isnan().any()
        results.append((losses, model))
    (losses, ours), (theirs_losses, theirs) = results
    np.testing.assert_allclose(losses, theirs_losses, rtol=1e-4)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", [row for row in TAKING if row is not SPARSE_ADAM])
def test_a_table_that_is_tied_to_a_dense_layer(row):
    """The sum of a sparse and a dense gradient is dense; both kinds come to one parameter in turn."""
    table = torch.nn.Embedding(20, 8, sparse=True)
    ours = row.ours(table.parameters(), **FULL[row.name])
    for step in range(1, 6):
        ours.zero_grad()
        out = table(torch.tensor([1, 5, 5, 19]))
        loss = (out @ table.weight.t()).square().mean() if step % 2 else out.square().mean()
        loss.backward()
        assert table.weight.grad.is_sparse == (step % 2 == 0)
        checked_step(row, ours, roundings=16)  # the entries of a row are not added up without error


# -- bits ------------------------------------------------------------------------------------------------------------

ISAS = [name for name, supported in onepass._core.isas().items() if supported]


@pytest.mark.slow
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
@each_row
def test_instruction_sets_and_threads(row, state_dtype):
    # The core wakes one thread for every 2 MiB that a step moves.
    params = [torch.randn(shape) for shape in [(30_000, 64), (400_000, 1), (3, 200_000), (7, 3)]]
    params += [torch.randn(9_000, 100).bfloat16()]
    grads = [[sparse(p, 1, exact=False, part=1.1) for p in params] for _ in range(2)]
    results = {}
    for isa, threads in itertools.product(ISAS, (1, 2, 3)):
        onepass._core.force_isa(isa)
        torch.set_num_threads(threads)
        ours = row.ours([p.clone().requires_grad_() for p in params], **FULL[row.name], state_dtype=state_dtype)
        for step in grads:
            give(ours, step)
            ours.step()
        results[isa, threads] = everything(row, ours)
    expected = results[ISAS[0], 1]
    assert expected[0] != bits(params[0])
    assert [key for key, result in results.items() if result != expected] == []


# -- states and checkpoints ------------------------------------------------------------------------------------------


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("direction", ["to_torch", "from_torch"])
@torchs_cases
def test_exchange_with_torch(row, kwargs, direction):
    """A checkpoint goes over without a changed bit, and both go on to the same numbers."""
    params = tables()
    grads = [sparse_gradients(params, step) for step in range(1, 11)]
    classes = (row.ours, row.theirs) if direction == "to_torch" else (row.theirs, row.ours)
    one = classes[0](copies(params), **kwargs)
    for step in grads[:5]:
        give(one, step)
        one.step()
    other = classes[1](copies(params_of(one)))
    other.load_state_dict(through_a_file(one.state_dict()))
    assert everything(row, other) == everything(row, one)
    for step in grads[5:]:
        for optimizer in (one, other):
            give(optimizer, step)
            optimizer.step()
    for p, q in zip(params_of(one), params_of(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for name in row.states:
            if name in one.state[p]:
                torch.testing.assert_close(one.state[p][name], other.state[q][name], rtol=1e-5, atol=1e-6)
        assert one.state[p].get("step") == other.state[q].get("step")
        assert type(one.state[p].get("step")) is type(other.state[q].get("step"))


def test_sparse_adams_state_is_torchs():
    (p,) = params = [torch.randn(6, 2, requires_grad=True)]
    ours, theirs = onepass.SparseAdam(params), torch.optim.SparseAdam(copies(params))
    assert not ours.state
    for optimizer in (ours, theirs):
        give(optimizer, [sparse(p, 1)])
        optimizer.step()
    assert [*ours.state[p]] == [*theirs.state[params_of(theirs)[0]]] == ["step", "exp_avg", "exp_avg_sq"]
    assert type(ours.state[p]["step"]) is int
    assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()
    assert copy.deepcopy(ours).state_dict()["state"][0]["step"] == 1


@each_row
def test_resume(row):
    params = tables()
    grads = [sparse_gradients(params, step) for step in range(1, 7)]
    straight, first = (row.ours(copies(params), **FULL[row.name]) for _ in range(2))
    for step in grads[:3]:
        give(first, step)
        first.step()
    second = row.ours(copies(params_of(first)))
    second.load_state_dict(through_a_file(first.state_dict()))
    for optimizer, steps in ((straight, grads), (second, grads[3:])):
        for step in steps:
            give(optimizer, step)
            optimizer.step()
    assert everything(row, second) == everything(row, straight)


# -- hooks, closures, scalers ----------------------------------------------------------------------------------------


def test_hooks_and_closure():
    p = torch.randn(6, 2, requires_grad=True)
    ours = onepass.SparseAdam([p])
    calls = []
    ours.register_step_pre_hook(lambda *_: calls.append("before"))
    ours.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        assert torch.is_grad_enabled()
        calls.append("closure")
        p.grad = sparse(p, 1)
        return 7.0

    assert ours.step(closure) == 7.0
    assert calls == ["before", "closure", "after"]
    assert isinstance(ours, torch.optim.SparseAdam)


@each_row
def test_loss_scale(row):
    """Gradients are unscaled inside the kernel: a scale that is a power of two changes no bit."""
    params = tables()
    plain, scaled = (row.ours(copies(params), **FULL[row.name]) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    scaler.scale(torch.ones(()))  # which makes its tensors
    for step in range(1, 6):
        grads = sparse_gradients(params, step)
        give(plain, grads)
        give(scaled, [grad * 1024 for grad in grads])
        if step == 3:  # is skipped
            params_of(scaled)[0].grad._values()[0, 0] = torch.inf
        else:
            plain.step()
        scaler.step(scaled)
        scaler.update(1024.0)
        assert everything(row, plain) == everything(row, scaled)


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("index", [6, -1, 2**40])
@each_row
def test_an_index_out_of_range(row, index, steps):
    """Nothing is written, to the parameters before it neither, and no state is created."""
    params = [torch.randn(4, 2, requires_grad=True), torch.randn(6, 2, requires_grad=True)]
    ours = row.ours([("first", params[0]), ("table", params[1])], **FULL[row.name])
    for _ in range(steps):
        give(ours, [sparse(p, 1) for p in params])
        ours.step()
    before = everything(row, ours)
    bad = torch.sparse_coo_tensor([[3, index]], torch.ones(2, 2), (6, 2), check_invariants=False)
    give(ours, [sparse(params[0], 1), bad])
    text = (
        f"{row.name}: parameter 1 of group 0 'table' (shape [6, 2], torch.float32): its gradient is not valid: "
        f"index {index} of entry 1 is out of range for dimension 0 of size 6"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        ours.step()
    assert everything(row, ours) == before
    assert [(r.path, r.reason) for r in onepass.explain(ours)] == [("kernel", ""), ("error", text)]


@each_row
def test_a_gradient_of_another_shape(row):
    p = torch.randn(6, 2, requires_grad=True)
    ours = row.ours([p], **FULL[row.name])
    give(ours, [sparse(p, 1)])
    p.data = torch.randn(5, 2)
    with pytest.raises(ValueError, match=r"\(shape \[5, 2\], torch.float32\): its gradient has shape \[6, 2\]$"):
        ours.step()


@pytest.mark.parametrize("steps", [0, 2])
def test_sparse_adam_refuses_dense_gradients_in_torchs_words(steps):
    params = [torch.randn(4, 2, requires_grad=True), torch.randn(6, 2, requires_grad=True)]
    ours = onepass.SparseAdam(params)
    for _ in range(steps):
        give(ours, [sparse(p, 1) for p in params])
        ours.step()
    before = everything(SPARSE_ADAM, ours)
    give(ours, [sparse(params[0], 1), torch.ones(6, 2)])
    with pytest.raises(RuntimeError) as caught:
        ours.step()
    give(theirs := torch.optim.SparseAdam(copies(params)), [None, torch.ones(6, 2)])
    with pytest.raises(RuntimeError, match="dense gradients") as torchs:
        theirs.step()
    assert str(caught.value) == str(torchs.value)
    assert everything(SPARSE_ADAM, ours) == before


def test_sparse_adam_with_a_step_that_is_no_double():
    """Not even the parameter before it is written."""
    params = [torch.randn(4, 2, requires_grad=True), torch.randn(6, 2, requires_grad=True)]
    ours = onepass.SparseAdam(params)
    give(ours, [sparse(p, 1) for p in params])
    ours.step()
    ours.state[params[1]]["step"] = 10**400
    before = everything(SPARSE_ADAM, ours)
    text = (
        "SparseAdam: parameter 1 of group 0 (shape [6, 2], torch.float32): its state step is an int that no float "
        "can hold"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        ours.step()
    assert everything(SPARSE_ADAM, ours) == before
    assert [(r.path, r.reason) for r in onepass.explain(ours)] == [("kernel", ""), ("error", text)]


def test_adagrad_refuses_coupled_decay_in_torchs_words():
    params = [torch.randn(6, 2, requires_grad=True)]
    ours, theirs = (cls(copies(params), weight_decay=0.1) for cls in (onepass.Adagrad, torch.optim.Adagrad))
    texts = []
    before = everything(ROW["Adagrad"], ours)
    for optimizer in (ours, theirs):
        give(optimizer, [sparse(params[0], 1)])
        with pytest.raises(RuntimeError, match="weight_decay") as caught:
            optimizer.step()
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert everything(ROW["Adagrad"], ours) == before


# -- paths -----------------------------------------------------------------------------------------------------------


def leaf(p: Tensor, grad: Tensor) -> Tensor:
    p = p.detach().requires_grad_()
    p.grad = grad
    return p


def overlapping() -> Tensor:
    p = torch.ones(6, 2)
    return leaf(p, torch.sparse_coo_tensor([[4, 5]], p[:2], (6, 2), check_invariants=True))


def shared() -> list[Tensor]:
    memory = torch.randn(8, 2)
    return [leaf(memory[:6], sparse(memory[:6], 1)), leaf(memory[2:], sparse(memory[2:], 1))]


def complex_table() -> Tensor:
    p = torch.randn(6, 2, dtype=torch.complex64)
    return leaf(p, torch.sparse_coo_tensor([[4, 1]], torch.ones_like(p[:2]), (6, 2), check_invariants=True))


# Parameters, SGD's arguments, and why torch steps them ("": it does not).
PATHS = {
    "plain": (lambda: [leaf(torch.ones(6, 2), sparse(torch.ones(6, 2), 1))], {}, ""),
    "momentum": (lambda: [leaf(torch.ones(6, 2), sparse(torch.ones(6, 2), 1))], {"momentum": 0.9}, "sparse gradient"),
    "not contiguous": (
        lambda: [leaf(torch.ones(2, 6).t(), sparse(torch.ones(6, 2), 1))],
        {},
        "sparse gradient of a parameter that is not contiguous",
    ),
    "complex": (lambda: [complex_table()], {}, "sparse gradient of a complex parameter"),
    "overlapping": (lambda: [overlapping()], {}, "gradient that overlaps its parameter or states"),
    "shared": (shared, {}, "memory shared with another parameter"),
}


@pytest.mark.parametrize(("make", "kwargs", "reason"), [pytest.param(*row, id=name) for name, row in PATHS.items()])
def test_what_explain_tells_is_what_a_step_does(make, kwargs, reason):
    torch.manual_seed(5)
    theirs = torch.optim.SGD(make(), lr=0.1, **kwargs)
    torch.manual_seed(5)
    ours = onepass.SGD(make(), lr=0.1, **kwargs)
    told = [(row.path, row.reason) for row in onepass.explain(ours)]
    assert told == [("torch" if reason else "kernel", reason)] * len(told)
    before = onepass.stats()
    ours.step()
    theirs.step()
    after = onepass.stats()
    assert sum(after["kernel"].values()) - sum(before["kernel"].values()) == (0 if reason else len(told))
    if reason:
        assert after["torch"][reason] - before["torch"].get(reason, 0) == len(told)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q)


def test_explain_tells_of_dense_gradients_for_sparse_adam():
    ours = onepass.SparseAdam([leaf(torch.ones(3, 2), torch.ones(3, 2)), torch.ones(2, requires_grad=True)])
    assert [(r.path, r.reason) for r in onepass.explain(ours)] == [
        ("torch", "dense gradient"),
        ("kernel", "no gradient now"),
    ]


def test_a_state_that_is_not_contiguous_goes_to_torch():
    params = [torch.randn(6, 2, requires_grad=True)]
    ours, theirs = (cls(copies(params)) for cls in (onepass.SparseAdam, torch.optim.SparseAdam))
    for step in range(3):
        grad = sparse(params[0], 1)
        for optimizer in (ours, theirs):
            give(optimizer, [grad])
            optimizer.step()
            if step == 0:
                for state in optimizer.state.values():
                    state["exp_avg"] = state["exp_avg"].t().contiguous().t()
    (p,), (q,) = params_of(ours), params_of(theirs)
    torch.testing.assert_close(p, q)
    assert onepass.stats()["torch"]["sparse gradient beside a state that is not contiguous"] == 2
    assert ours.state[p]["step"] == 3
    assert real(ours.state[p]["exp_avg"]).stride() == (1, 6)
