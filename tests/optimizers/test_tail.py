"""What a step does beside the update: clipping, skipping, averages, copies and zeroed gradients.

A twin does the same in separate operations: the norm in float64, clipped copies of the gradients, the bare step of the
same class, the average and the copy of what is then in memory. The results must be the same to the bit, but for the
averages, which torch may compute with other roundings.
"""

import copy
import math
import pickle

import numpy as np
import onepass
import pytest
import torch
from cases import ELEMENTWISE, ROWS
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onepass.swa_utils import AveragedModel
from reference import ROUNDING, bits, numbers
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import swa_utils

WITH_TAIL = [row for row in ROWS if row.ours is not onepass.LBFGS]
SHAPES = [(), (5,), (4, 3), (2, 0), (2, 3, 4, 5), (1100,), (70, 300)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def model_of(row, dtypes=(torch.float32,), seed=0, shapes=None):
    """A module whose parameters have the row's shapes and, in turn, these dtypes."""
    torch.manual_seed(seed)
    shapes = shapes or (row.shapes if row.takes_matrices or row.has_means else SHAPES)
    if row.wants_sparse:
        shapes = [shape for shape in shapes if shape]
    made = nn.ParameterList()
    for i, shape in enumerate(shapes):
        made.append(nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtypes[i % len(dtypes)])))
        made[-1].grad_dtype = None
    return made


def give_gradients(row, model, seed, scale=1.0):
    torch.manual_seed(seed)
    for p in model.parameters():
        grad = (torch.randn(p.shape, dtype=torch.float64) * scale).to(p.dtype)
        p.grad = grad.to_sparse(1) if row.wants_sparse and p.ndim else grad


def settings_of(row):
    return row.full


def norm_of(params, largest=False):
    values = np.concatenate([[0.0], *(numbers(p.grad).ravel() for p in params if p.grad is not None)])
    return float(abs(values).max()) if largest else math.sqrt(math.fsum(values**2))


class Subclass(torch.Tensor):
    """A tensor that kernels do not step."""

    def __deepcopy__(self, memo):
        return nn.Parameter(self.detach().clone())


def twin_step(optimizer, params, *, coefficient=1.0, clip_value=None):
    """Steps by copies of the gradients that are scaled and clamped in the arithmetic of the kernels."""
    grads = [p.grad for p in params]
    for p, grad in zip(params, grads, strict=True):
        if grad is None:
            continue
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        if type(p.data) is not torch.Tensor:  # torch's operations round the scaled gradient to its dtype
            scaled = grad * coefficient
            p.grad = scaled if clip_value is None else scaled.clamp(-clip_value, clip_value)
            continue
        values = grad.coalesce().values() if grad.is_sparse else grad
        scaled = values.to(wide) * torch.tensor(coefficient, dtype=wide)
        if clip_value is not None:
            scaled = scaled.clamp(-clip_value, clip_value)
        if grad.is_sparse:
            scaled = torch.sparse_coo_tensor(
                grad.coalesce().indices(), scaled, grad.shape, is_coalesced=True, check_invariants=True
            )
        p.grad = scaled
    optimizer.step()
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


def assert_same_bits(a, b):
    for x, y in zip(a, b, strict=True):
        assert bits(x) == bits(y)


def all_states(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [s for p in params for _, s in sorted(optimizer.state.get(p, {}).items()) if isinstance(s, torch.Tensor)]


def assert_same_optimizers(a, b):
    assert_same_bits(a.param_groups[0]["params"], b.param_groups[0]["params"])
    assert_same_bits(all_states(a), all_states(b))


def pair_of(row, dtypes=(torch.float32,), shapes=None, **arguments):
    """The same optimizer twice, on models of the same values: with the arguments, and bare."""
    models = [model_of(row, dtypes, shapes=shapes) for _ in range(2)]
    optimizer = row.ours(models[0].parameters(), **settings_of(row), **arguments)
    return optimizer, bare_of(row, models[1].parameters()), *models


def bare_of(row, params):
    """An optimizer whose states have the dtypes of its parameters, although the twin's gradients are in float32."""
    bare = row.ours(params, **settings_of(row))
    new_state = bare._new_state
    bare._new_state = lambda group, p, grad, name: new_state(group, p, grad.to(p.dtype), name)
    return bare


# -- clipping --------------------------------------------------------------------------------------------------------


class Sharded(torch.Tensor):
    """A subclass that has a mesh, as subclasses of DTensor have."""

    device_mesh = None


@pytest.mark.cpu  # where kernels measure the other gradients
def test_a_process_without_a_gradient_takes_part_in_the_norm(monkeypatch):
    """Other processes may have a gradient of such a parameter, and wait for this one."""
    calls = []

    def total_norm(params, grads, largest, measures):
        calls.append((grads, list(measures)))
        return 3.0

    monkeypatch.setattr(onepass.optimizers.tail, "total_norm", total_norm)
    p = nn.Parameter(torch.ones(2))
    sharded = nn.Parameter(torch.ones(2).as_subclass(Sharded))
    optimizer = onepass.SGD([p, sharded], lr=1.0, max_norm=1.5)
    p.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert calls == [([p.grad, None], [25.0, None])]
    assert optimizer.last_step.grad_norm == 3.0
    assert p.tolist() == (1 - p.grad * (1.5 / (3.0 + 1e-6))).tolist()


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("row", WITH_TAIL, ids=lambda row: row.name)
def test_max_norm(row, norm_type):
    optimizer, bare, model, twin = pair_of(row, max_norm=1.5, norm_type=norm_type)
    for step in range(4):
        for each in (model, twin):
            give_gradients(row, each, step, scale=(1.0, 1e-6, 100.0, 1e3)[step])
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        report = optimizer.last_step
        norm = norm_of(twin.parameters(), largest=norm_type != 2)
        assert report.grad_norm == pytest.approx(norm, rel=1e-12)
        assert report.coefficient == pytest.approx(min(1.0, 1.5 / (norm + 1e-6)), rel=1e-12)
        assert not report.skipped
        assert_same_bits([p.grad.to_dense() for p in model.parameters()], [grad.to_dense() for grad in before])
        twin_step(bare, list(twin.parameters()), coefficient=report.coefficient)
        assert_same_optimizers(optimizer, bare)


@pytest.mark.parametrize("clip", [{"max_norm": 0.7}, {"clip_value": 0.01}], ids=lambda clip: next(iter(clip)))
@pytest.mark.parametrize("row", [row for row in WITH_TAIL if not row.wants_sparse], ids=lambda row: row.name)
def test_as_torchs_operations(row, clip):
    model, twin = (model_of(row, (torch.float64,)) for _ in range(2))
    optimizer = row.ours(model.parameters(), **settings_of(row), **clip)
    theirs = row.theirs(twin.parameters(), **settings_of(row))
    for step in range(4):
        for each in (model, twin):
            give_gradients(row, each, step)
        optimizer.step()
        if "max_norm" in clip:
            nn.utils.clip_grad_norm_(twin.parameters(), 0.7)
        else:
            nn.utils.clip_grad_value_(twin.parameters(), 0.01)
        theirs.step()
        # Muon's iterations are in bfloat16.
        tolerance = {"rtol": 2e-2, "atol": 2e-3} if row.takes_matrices else {"rtol": 1e-8, "atol": 1e-9}
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, **tolerance)


@pytest.mark.cpu
@pytest.mark.parametrize("dtypes", [[dtype] for dtype in DTYPES] + [DTYPES], ids=str)
@pytest.mark.parametrize("row", WITH_TAIL, ids=lambda row: row.name)
def test_clip_value_and_norm_together(row, dtypes):
    if row.takes_matrices and torch.float16 in dtypes:
        dtypes = [torch.float32]
    optimizer, bare, model, twin = pair_of(row, dtypes, max_norm=20.0, clip_value=0.25)
    for step in range(3):
        for each in (model, twin):
            give_gradients(row, each, step)
        optimizer.step()
        assert optimizer.last_step.coefficient < 1.0 or row.takes_matrices or len(list(twin.parameters())) < 7
        twin_step(bare, list(twin.parameters()), coefficient=optimizer.last_step.coefficient, clip_value=0.25)
        # torch's operations round the clamped gradient to its dtype.
        if not row.has_means and not row.takes_matrices:
            assert_same_optimizers(optimizer, bare)
        else:
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=0.02, atol=0.02)


def test_the_norm_is_that_of_all_groups_and_dtypes():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3, 5, dtype=dtype)) for dtype in (torch.complex64, *DTYPES)]
    groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.2, "maximize": True}]
    optimizer = onepass.SGD(groups, max_norm=math.inf)
    for p in params:
        p.grad = torch.randn_like(p)
    params.append(nn.Parameter(torch.zeros(3)))  # without a gradient
    optimizer.add_param_group({"params": params[-1:]})
    optimizer.step()
    assert optimizer.last_step.grad_norm == pytest.approx(norm_of(params), rel=1e-12)
    assert optimizer.last_step.coefficient == 1.0


def test_the_largest_magnitude_of_complex_gradients():
    p = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = onepass.SGD([p], lr=1.0, max_norm=1.0, norm_type=math.inf)
    p.grad = torch.tensor([3 + 4j, 1j, -4.5 + 0j], dtype=torch.complex64)
    optimizer.step()
    assert optimizer.last_step.grad_norm == pytest.approx(5.0, rel=1e-12)
    torch.testing.assert_close(p.detach(), -p.grad / (5 + 1e-6))


@pytest.mark.cpu
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_for_any_number_of_threads(threads, all_threads):
    def norms(threads):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(300_001))
        optimizer = onepass.SGD([p, nn.Parameter(torch.randn(77))], max_norm=1.0)
        for q in optimizer.param_groups[0]["params"]:
            q.grad = torch.randn_like(q)
        optimizer.step()
        return optimizer.last_step.grad_norm, bits(p)

    before = torch.get_num_threads()
    try:
        assert norms(threads) == norms(1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.cpu
def test_strided_expanded_and_lazy_gradients():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(30, 40)) for _ in range(5)]
    params[3] = nn.Parameter(torch.randn(30, 40, dtype=torch.complex64))
    params[0].grad = torch.randn(40, 30).T
    params[1].grad = torch.randn(1, 40).expand(30, 40)
    params[2].grad = torch.randn(60, 80)[::2, ::2]
    params[3].grad = torch.randn(30, 40, dtype=torch.complex64).conj()
    params[4].grad = torch.zeros(30, 40)
    twins = copy.deepcopy(params)
    for twin, p in zip(twins, params, strict=True):
        twin.grad = p.grad.clone()
    optimizer = onepass.AdamW(params, lr=0.1, max_norm=0.5, clip_value=0.01)
    optimizer.step()
    assert optimizer.last_step.grad_norm == pytest.approx(norm_of(params), rel=1e-12)
    bare = onepass.AdamW(twins, lr=0.1)
    for twin in twins:
        scaled = twin.grad * torch.tensor(optimizer.last_step.coefficient, dtype=torch.float32)
        view = torch.view_as_real(scaled) if scaled.is_complex() else scaled
        view.clamp_(-0.01, 0.01)
        twin.grad = scaled
    bare.step()
    assert_same_optimizers(optimizer, bare)


@pytest.mark.parametrize("row", [row for row in ELEMENTWISE if row.sparse != "neither"], ids=lambda row: row.name)
def test_sparse_gradients_are_measured_coalesced(row):
    p, dense = nn.Parameter(torch.ones(6, 2)), nn.Parameter(torch.ones(3))
    sparse_settings = {"lr": 0.1}
    optimizer = row.ours([p] if row.wants_sparse else [p, dense], **sparse_settings, max_norm=1.0)
    p.grad = torch.sparse_coo_tensor([[4, 1, 4]], [[1.0, 2.0], [3.0, 4.0], [-3.0, 5.0]], (6, 2), check_invariants=True)
    dense.grad = torch.full((3,), 2.0)
    optimizer.step()
    squares = 4.0 + 49.0 + 9.0 + 16.0 + (0.0 if row.wants_sparse else 12.0)
    assert optimizer.last_step.grad_norm == pytest.approx(math.sqrt(squares), rel=1e-14)


def test_max_norm_of_zero_and_infinity():
    for max_norm, coefficient in ((0.0, 0.0), (math.inf, 1.0), (torch.tensor(2.0), 2 / (4 + 1e-6))):
        p = nn.Parameter(torch.zeros(4))
        optimizer = onepass.SGD([p], lr=1.0, max_norm=max_norm)
        p.grad = torch.full((4,), 2.0)
        optimizer.step()
        assert optimizer.last_step.coefficient == pytest.approx(coefficient)
        torch.testing.assert_close(p.detach(), torch.full((4,), -2.0 * coefficient))


# -- policies --------------------------------------------------------------------------------------------------------


class Recorder:
    """A policy that returns what it is told, and records what it was asked."""

    def __init__(self, *coefficients):
        self.coefficients, self.norms = list(coefficients), []

    def coefficient(self, norm):
        self.norms.append(norm)
        return self.coefficients.pop(0)

    def state_dict(self):
        return {"coefficients": list(self.coefficients), "norms": list(self.norms)}

    def load_state_dict(self, state_dict):
        self.coefficients, self.norms = list(state_dict["coefficients"]), list(state_dict["norms"])


@pytest.mark.parametrize("row", WITH_TAIL, ids=lambda row: row.name)
def test_policy(row):
    told = (0.5, 0.0, 1.0, 3.0)
    policy = Recorder(*told)
    optimizer, bare, model, twin = pair_of(row, max_norm=policy)
    norms = []
    for step, coefficient in enumerate(told):
        for each in (model, twin):
            give_gradients(row, each, step)
        norms.append(norm_of(twin.parameters()))
        optimizer.step()
        assert optimizer.last_step == (
            pytest.approx(norms[-1], rel=1e-12),
            coefficient,
            step == 1,
            "Recorder" if step == 1 else "",
        )
        if step != 1:
            twin_step(bare, list(twin.parameters()), coefficient=coefficient)
        assert_same_optimizers(optimizer, bare)
    assert policy.norms == pytest.approx(norms, rel=1e-12)


def test_a_policy_is_not_asked_about_norms_that_are_not_finite():
    policy = Recorder(0.5)
    p = nn.Parameter(torch.ones(3))
    optimizer = onepass.SGD([p], lr=0.1, max_norm=policy)
    for bad in (math.nan, math.inf):
        p.grad = torch.tensor([1.0, bad, 1.0])
        optimizer.step()
        assert optimizer.last_step.coefficient == 1.0
    assert policy.norms == []


@pytest.mark.parametrize("coefficient", [None, "1", torch.ones(2)], ids=str)
def test_a_policy_must_return_a_number(coefficient):
    p = nn.Parameter(torch.ones(3))
    optimizer = onepass.AdamW([p], lr=0.1, max_norm=Recorder(coefficient))
    p.grad = torch.ones(3)
    with pytest.raises((TypeError, ValueError), match=r"Recorder.coefficient\(1.73.*\): the result must be"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


@pytest.mark.parametrize("coefficient", [math.nan, -0.5, math.inf])
def test_a_policy_must_return_a_finite_coefficient(coefficient):
    p = nn.Parameter(torch.ones(3))
    optimizer = onepass.AdamW([p], lr=0.1, max_norm=Recorder(coefficient))
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"Recorder.coefficient\(1.73.*\) must return a finite number"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


def test_an_exception_of_a_policy_changes_nothing():
    p = nn.Parameter(torch.ones(3))
    optimizer = onepass.AdamW([p], lr=0.1, max_norm=Recorder())
    p.grad = torch.ones(3)
    with pytest.raises(IndexError):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


@pytest.mark.parametrize("policy", [onepass.ZClip, onepass.AutoClip, onepass.SkipSpikes])
def test_resuming_with_a_policy(policy, tmp_path):
    def make():
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(50))
        return p, onepass.AdamW([p], lr=0.1, max_norm=policy())

    def train(p, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            p.grad = torch.randn(50) * (30.0 if step % 7 == 5 else 1.0)
            optimizer.step()

    whole, one = make()
    train(whole, one, range(60))
    first, two = make()
    train(first, two, range(40))
    torch.save({"p": first.data, "optimizer": two.state_dict()}, tmp_path / "c.pt")
    loaded = torch.load(tmp_path / "c.pt", weights_only=True)
    second, three = make()
    second.data.copy_(loaded["p"])
    three.load_state_dict(loaded["optimizer"])
    assert three.param_groups[0]["clipping_policy"] == ""
    train(second, three, range(40, 60))
    assert bits(second) == bits(whole)
    assert three.last_step == one.last_step
    # The state_dict loads into torch's class, and into ours without a policy.
    for other in (torch.optim.AdamW([second], lr=1.0), onepass.AdamW([second], lr=1.0)):
        other.load_state_dict(loaded["optimizer"])
        assert other.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("form", [{}, {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}], ids=str)
@pytest.mark.parametrize("policy", [onepass.ZClip, onepass.AutoClip, onepass.SkipSpikes])
def test_a_policy_in_distributed_checkpoints(policy, form):
    options = dcp.StateDictOptions(**form)

    def make():
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        return model, onepass.AdamW(model.parameters(), lr=0.1, max_norm=policy())

    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape) * (30.0 if step % 7 == 5 else 1.0)
            optimizer.step()

    model, one = make()
    train(model, one, range(5))
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, one, options=options))
    resumed, two = make()
    resumed.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(resumed, two, saved, options=options)
    assert two._tail.policy.state_dict() == one._tail.policy.state_dict()
    for each in ((model, one), (resumed, two)):
        train(*each, range(5, 30))
    assert two.last_step == one.last_step
    assert [bits(p) for p in resumed.parameters()] == [bits(p) for p in model.parameters()]


@pytest.mark.parametrize("wrap", [lambda opt: opt, lambda opt: onepass.Lookahead(opt, k=3)], ids=["", "Lookahead"])
@pytest.mark.parametrize("name", ["SGD", "Lion"])  # Adam's bias correction counts that step, as torch's does
def test_the_step_by_which_distributed_checkpoints_create_states(name, wrap):
    """It moves no average, no policy and no cycle."""

    def run(asks):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        average = AveragedModel(model, decay=0.5)
        optimizer = wrap(getattr(onepass, name)(model.parameters(), lr=0.1, max_norm=onepass.ZClip(), average=average))
        if asks:
            dcp.get_optimizer_state_dict(model, optimizer)
        for step in range(4):
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape)
            optimizer.step()
            average.update_parameters(model)
        inner = optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer
        averages = [bits(p) for p in average.parameters()]
        cycle = optimizer.param_groups[0].get("lookahead")
        params = [bits(p) for p in model.parameters()]
        return params, averages, int(average.n_averaged), inner._tail.policy.state_dict(), cycle

    assert run(asks=True) == run(asks=False)


def test_parts_that_fsdp_does_not_describe_are_refused():
    import torch.distributed.fsdp

    p = nn.Parameter(torch.ones(3))
    optimizer = onepass.AdamW([p], max_norm=1.0)
    p.grad = torch.ones(3)
    optimizer.step()
    p._fsdp_flattened = True  # as FullyShardedDataParallel marks its parameters
    before = bits(p)
    with pytest.raises(ValueError, match="AdamW: max_norm needs whole parameters or DTensors"):
        optimizer.step()
    assert bits(p) == before
    onepass.AdamW([p], zero_grad=True).step()


def test_an_invalid_policy_state_loads_nothing():
    p = nn.Parameter(torch.ones(3))
    optimizer = onepass.AdamW([p], lr=0.1, max_norm=onepass.ZClip())
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["lr"] = 7.0
    state_dict["param_groups"][0]["clipping_policy"] = {"policy": "AutoClip"}
    with pytest.raises((ValueError, KeyError, TypeError)):
        optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.1


# -- skipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("row", WITH_TAIL, ids=lambda row: row.name)
def test_skip_nonfinite(row, norm_type, bad):
    model = model_of(row)
    average = AveragedModel(model, decay=0.5)
    copies = [p.detach().bfloat16() for p in model.parameters()]
    policy = onepass.ZClip()
    optimizer = row.ours(
        model.parameters(),
        **settings_of(row),
        max_norm=policy,
        norm_type=norm_type,
        skip_nonfinite=True,
        average=average,
        copy_to=copies,
    )

    def everything():
        tensors = [*model.parameters(), *average.module.parameters(), *copies, *all_states(optimizer)]
        return [bits(t) for t in tensors], int(average.n_averaged), policy.state_dict()

    for first in (True, False):  # before there are states, and after
        before = everything()
        give_gradients(row, model, 1)
        last = [p for p in model.parameters() if p.numel()][-1]
        (last.grad._values() if last.grad.is_sparse else last.grad).view(-1)[-1] = bad
        optimizer.step()
        average.update_parameters(model)
        assert everything() == before
        assert optimizer.last_step.skipped
        assert optimizer.last_step.reason == f"the gradients' norm is {optimizer.last_step.grad_norm}"
        if first:
            give_gradients(row, model, 2)
            optimizer.step()
            assert not optimizer.last_step.skipped
            assert everything() != before


def test_without_skip_nonfinite_a_bad_gradient_is_visible():
    p = nn.Parameter(torch.ones(3))
    optimizer = onepass.SGD([p], lr=0.1, max_norm=1.0)
    p.grad = torch.tensor([1.0, math.nan, 1.0])
    optimizer.step()
    assert p.isnan().all()
    assert math.isnan(optimizer.last_step.grad_norm)


# -- averages and copies ---------------------------------------------------------------------------------------------


def assert_averages(found, averages, params, weight, dtype_of_average):
    """Each is the old average moved towards what is stored in the parameter, to two roundings."""
    for got, old, p in zip(found, averages, params, strict=True):
        with np.errstate(invalid="ignore"):
            want = numbers(p) if weight == 1.0 else old + weight * (numbers(p) - old)
            room = 2 * ROUNDING[dtype_of_average(got)] * (abs(want) + weight * abs(numbers(p) - old)) + 1e-38
            near = abs(numbers(got) - want) <= room
        assert (near | (numbers(got) == want) | np.isnan(want)).all()  # infinities are averages, too


@pytest.mark.parametrize("decay", [None, 0.9, 0.0, 1.0])
@pytest.mark.parametrize("dtypes", [[dtype] for dtype in DTYPES] + [DTYPES], ids=str)
@pytest.mark.parametrize("row", WITH_TAIL, ids=lambda row: row.name)
def test_average(row, dtypes, decay):
    if row.takes_matrices and torch.float16 in dtypes:
        dtypes = [torch.float32]
    model = model_of(row, dtypes)
    average = AveragedModel(model, decay=decay).float()
    bare_model = model_of(row, dtypes)
    optimizer = row.ours(model.parameters(), **settings_of(row), average=average)
    bare = row.ours(bare_model.parameters(), **settings_of(row))
    for step in range(4):
        for each in (model, bare_model):
            give_gradients(row, each, step)
            if step == 2:
                next(iter(each.parameters())).grad = None
        before = [numbers(p) for p in average.module.parameters()]
        optimizer.step()
        bare.step()
        assert_same_optimizers(optimizer, bare)
        weight = 1.0 if step == 0 else 1 / (step + 1) if decay is None else 1 - decay
        params = list(model.parameters())
        assert_averages(average.module.parameters(), before, params, weight, lambda got: got.dtype)
        if weight == 1.0:
            for p, averaged in zip(params, average.module.parameters(), strict=True):
                assert torch.equal(averaged, p.float())
        assert int(average.n_averaged) == step + 1
        if step % 2:
            average.update_parameters(model)  # nothing is left
            assert int(average.n_averaged) == step + 1


def test_average_as_torchs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.Linear(20, 3))
    twin = copy.deepcopy(model)
    average = AveragedModel(model, decay=0.8)
    theirs = torch.optim.swa_utils.AveragedModel(twin, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8))
    optimizer = onepass.AdamW(model.parameters(), lr=0.01, average=average)
    bare = onepass.AdamW(twin.parameters(), lr=0.01)
    for step in range(5):
        for each, by in ((model, optimizer), (twin, bare)):
            torch.manual_seed(step)
            by.zero_grad()
            each(torch.randn(8, 10)).square().sum().backward()
            by.step()
        average.update_parameters(model)
        theirs.update_parameters(twin)
        for (name, ours), expected in zip(average.state_dict().items(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=3e-7, atol=1e-8, msg=name)


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("row", WITH_TAIL, ids=lambda row: row.name)
def test_copy_to(row, to):
    model = model_of(row, [torch.float32, torch.bfloat16])
    copies = [torch.full_like(p, math.nan, dtype=to) for p in model.parameters()]
    optimizer = row.ours(model.parameters(), **settings_of(row), copy_to=copies)
    for step in range(2):
        give_gradients(row, model, step)
        optimizer.step()
        assert_same_bits(copies, [p.detach().to(to) for p in model.parameters()])


def test_copy_to_a_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    low = copy.deepcopy(model).bfloat16()
    groups = [{"params": [(n, p)]} for n, p in reversed(list(model.named_parameters()))]
    optimizer = onepass.AdamW(groups, lr=0.1, copy_to=low)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, q in zip(model.parameters(), low.parameters(), strict=True):
        assert torch.equal(p.bfloat16(), q)


def test_views_as_averages_and_copies():
    torch.manual_seed(0)
    model = nn.Linear(30, 20)
    copies = [torch.zeros(30, 20).T, torch.zeros(40)[::2]]
    average = AveragedModel(model, decay=0.5)
    average.module.weight.data = torch.zeros(30, 20).T.copy_(model.weight.detach())
    optimizer = onepass.SGD(model.parameters(), lr=0.1, average=average, copy_to=copies)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        before = [numbers(p) for p in average.module.parameters()]
        weight = average._step_weight(optimizer)
        optimizer.step()
        assert_averages(average.module.parameters(), before, model.parameters(), weight, lambda got: got.dtype)
        for p, copied in zip(model.parameters(), copies, strict=True):
            assert torch.equal(p, copied)


def test_versions_of_averages_and_copies():
    model = nn.Linear(3, 2)
    copies = [p.detach().bfloat16() for p in model.parameters()]
    average = AveragedModel(model, decay=0.5)
    optimizer = onepass.SGD(model.parameters(), lr=0.1, average=average, copy_to=copies, zero_grad=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    changed = [*copies, *average.module.parameters(), *(p.grad for p in model.parameters())]
    before = [t._version for t in changed]
    optimizer.step()
    assert all(t._version > version for t, version in zip(changed, before, strict=True))


# -- replaced parameters, averages and copies ------------------------------------------------------------------------


def three_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))


def step_by_ones(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def renew(module, dtype=None):
    """Assign new tensors to a module, as some ways of loading a checkpoint do."""
    module.load_state_dict(
        {name: tensor.clone().to(dtype or tensor.dtype) for name, tensor in module.state_dict().items()}, assign=True
    )


REPLACEMENTS = {
    "load_state_dict": renew,
    "in another dtype": lambda module: renew(module, torch.bfloat16),
    "one tensor": lambda module: setattr(module[0], "weight", nn.Parameter(module[0].weight.detach().clone())),
    "another object of one tensor": lambda module: setattr(module[0], "bias", nn.Parameter(module[0].bias.data)),
    "converted in place": lambda module: module.double(),
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("by", REPLACEMENTS)
def test_replaced_averages_are_moved(by, steps):
    model, twin = three_layers(), three_layers()
    average, expected = AveragedModel(model, decay=0.5), AveragedModel(twin, decay=0.5)
    optimizer = onepass.SGD(model.parameters(), lr=0.1, average=average)
    bare = onepass.SGD(twin.parameters(), lr=0.1)
    for step in range(steps + 3):
        if step == steps:
            REPLACEMENTS[by](average.module)
            REPLACEMENTS[by](expected.module)
        step_by_ones(optimizer)
        step_by_ones(bare)
        expected.update_parameters(twin)
        for ours, theirs in zip(average.module.parameters(), expected.module.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert average.n_averaged == steps + 3


def test_layers_of_the_average_that_are_replaced_are_found_by_update_parameters():
    model = three_layers()
    average = AveragedModel(model, decay=0.5)
    optimizer = onepass.SGD(model.parameters(), lr=0.1, average=average)
    for replace in (
        lambda: average.module.__setitem__(1, copy.deepcopy(average.module[1])),
        lambda: setattr(average, "module", copy.deepcopy(average.module)),
    ):
        step_by_ones(optimizer)
        replace()
        average.update_parameters(model)
        average.n_averaged.zero_()  # the next step copies
        step_by_ones(optimizer)
        assert_same_bits(average.module.parameters(), model.parameters())


def test_an_average_that_is_removed_is_not_moved():
    model = three_layers()
    average = AveragedModel(model, decay=0.5)
    optimizer = onepass.SGD(model.parameters(), lr=0.1, average=average)
    average.module[0].bias = None
    del average.module[1].bias
    step_by_ones(optimizer)
    kept = [model[0].weight, model[1].weight, *model[2].parameters()]
    assert_same_bits(average.module.parameters(), kept)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("by", REPLACEMENTS)
@pytest.mark.parametrize("named", [True, False])
def test_replaced_copies_are_written(by, steps, named):
    model = three_layers()
    copies = copy.deepcopy(model).bfloat16()
    params = model.named_parameters() if named else model.parameters()
    optimizer = onepass.SGD(params, lr=0.1, copy_to=copies)
    for step in range(steps + 2):
        if step == steps:
            REPLACEMENTS[by](copies)
        step_by_ones(optimizer)
        pairs = zip(model.parameters(), copies.parameters(), strict=True)
        assert_same_bits(copies.parameters(), [p.to(q) for p, q in pairs])


@pytest.mark.parametrize("as_list", [True, False])
def test_exchanged_parameters_are_copied(as_list):
    model = three_layers()
    copies = copy.deepcopy(model)
    groups = [{"params": [model[i].weight, model[i].bias]} for i in (0, 1, 2)]
    if as_list:
        optimizer = onepass.SGD(groups, lr=0.1, copy_to=list(copies.parameters()))
    else:
        optimizer = onepass.SGD(model.parameters(), lr=0.1, copy_to=copies)
    step_by_ones(optimizer)
    model[0].bias = optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.randn(4))
    step_by_ones(optimizer)
    assert_same_bits(copies.parameters(), model.parameters())
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})  # which has no copy
    model[2].bias = optimizer.param_groups[-2]["params"][-1] = nn.Parameter(torch.randn(2))
    step_by_ones(optimizer)
    assert_same_bits(copies.parameters(), model.parameters())


def test_an_exchanged_parameter_of_the_model_is_averaged():
    model = three_layers()
    average = AveragedModel(model, decay=0.5)
    optimizer = onepass.SGD(model.parameters(), lr=0.1, average=average)
    first = model[0].bias
    model[0].bias = optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.randn(4))
    step_by_ones(optimizer)
    assert_same_bits(average.module.parameters(), model.parameters())
    assert not torch.equal(average.module[0].bias, first)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: x])
def test_parameters_that_leave_the_optimizer_take_their_copies_with_them(through):
    params = [nn.Parameter(torch.randn(3)) for _ in range(3)]
    copies = [torch.zeros(3) for _ in params]
    optimizer = onepass.SGD([{"params": [p]} for p in params], lr=0.1, copy_to=copies)
    del optimizer.param_groups[0]
    step_by_ones(optimizer)
    optimizer, params, copies = through((optimizer, params, copies))
    step_by_ones(optimizer)
    assert_same_bits(copies, [torch.zeros(3), *params[1:]])
    optimizer.add_param_group({"params": [params[0]]})
    step_by_ones(optimizer)
    assert_same_bits(copies, params)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copied_optimizers_follow_the_copied_module(through):
    model = three_layers()
    low = copy.deepcopy(model).bfloat16()
    optimizer, model, low = through((onepass.SGD(model.parameters(), lr=0.1, copy_to=low), model, low))
    renew(low)
    step_by_ones(optimizer)
    assert_same_bits(low.parameters(), [p.bfloat16() for p in model.parameters()])


REFUSED_REPLACEMENTS = {
    "average_shape": ("average", lambda: nn.Parameter(torch.zeros(1)), ValueError, "average of parameter 3 has shape"),
    "copy_shape": ("copy_to", lambda: nn.Parameter(torch.zeros(1)), ValueError, r"copy_to\[3\] has shape \[1\]"),
    "average_expanded": (
        "average",
        lambda: nn.Parameter(torch.zeros(1).expand(4)),
        ValueError,
        "average of parameter 3 must have memory for each of its elements",
    ),
    "copy_expanded": (
        "copy_to",
        lambda: nn.Parameter(torch.zeros(1).expand(4)),
        ValueError,
        r"copy_to\[3\] must have memory for each of its elements",
    ),
    "copy_sparse": (
        "copy_to",
        lambda: nn.Parameter(torch.zeros(4).to_sparse()),
        ValueError,
        r"copy_to\[3\] must be torch.strided, as its parameter is, got torch.sparse_coo",
    ),
    "copy_none": ("copy_to", lambda: None, TypeError, r"copy_to\[3\] must be a tensor, got the NoneType None"),
}


@pytest.mark.parametrize("case", REFUSED_REPLACEMENTS)
@pytest.mark.parametrize("of_param", [True, False])
def test_replacements_that_do_not_fit_change_nothing(case, of_param):
    argument, new, error, message = REFUSED_REPLACEMENTS[case]
    model = three_layers()
    follower = AveragedModel(model, decay=0.5) if argument == "average" else copy.deepcopy(model)
    optimizer = onepass.AdamW(model.parameters(), lr=0.1, **{argument: follower})
    step_by_ones(optimizer)
    (follower.module if argument == "average" else follower)[1].bias = new()

    def values():
        tensors = (*model.parameters(), *follower.parameters(), *all_states(optimizer))
        return [t.detach().to_dense().clone() for t in tensors]

    before = values()
    for _ in range(2):
        with pytest.raises(error, match=f"AdamW: {message}"):
            step_by_ones(optimizer)
    assert_same_bits(values(), before)


def test_an_exchanged_parameter_of_another_shape_changes_nothing():
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = onepass.SGD(params, lr=0.1, copy_to=[torch.zeros(2) for _ in params])
    optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.ones(3))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"SGD: copy_to\[1\] has shape \[2\], its parameter \[3\]"):
            step_by_ones(optimizer)
    assert all(torch.equal(p, torch.ones_like(p)) for p in params)


# -- zeroed gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [[dtype] for dtype in DTYPES], ids=str)
@pytest.mark.parametrize("row", WITH_TAIL, ids=lambda row: row.name)
def test_zero_grad(row, dtypes):
    if row.takes_matrices and torch.float16 in dtypes:
        dtypes = [torch.float32]
    optimizer, bare, model, twin = pair_of(row, dtypes, zero_grad=True)
    for step in range(3):
        for each in (model, twin):
            give_gradients(row, each, step)
        grads = [p.grad for p in model.parameters()]
        optimizer.step()
        bare.step()
        assert_same_optimizers(optimizer, bare)
        for p, grad in zip(model.parameters(), grads, strict=True):
            assert p.grad is grad
            assert not grad.to_dense().count_nonzero()


def test_zero_grad_of_views_shared_and_skipped_gradients():
    bucket = torch.randn(100)
    params = [nn.Parameter(torch.zeros(30)), nn.Parameter(torch.zeros(7, 10))]
    params[0].grad, params[1].grad = bucket[:30], bucket[30:].view(7, 10)
    optimizer = onepass.SGD(params, lr=1.0, zero_grad=True, skip_nonfinite=True)
    before = bucket.clone()
    optimizer.step()
    assert torch.equal(torch.cat([p.detach().flatten() for p in params]), -before)
    assert not bucket.count_nonzero()
    bucket[5] = math.nan
    optimizer.step()
    assert optimizer.last_step.skipped
    assert not bucket.count_nonzero()
    # One gradient of two parameters is read twice before it is zeroed.
    shared = torch.randn(30)
    both = [nn.Parameter(torch.zeros(30)) for _ in range(2)]
    for p in both:
        p.grad = shared
    before = shared.clone()
    onepass.SGD(both, lr=1.0, zero_grad=True).step()
    assert all(torch.equal(p, -before) for p in both)
    assert not shared.count_nonzero()


def test_zero_grad_refuses_expanded_gradients():
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))]
    params[0].grad, params[1].grad = torch.ones(3), torch.ones(1).expand(4)
    optimizer = onepass.SGD(params, lr=1.0, zero_grad=True)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 .*zero_grad=True cannot zero its gradient"):
        optimizer.step()
    assert not params[0].count_nonzero()
    assert torch.equal(params[0].grad, torch.ones(3))


# -- all of it together ----------------------------------------------------------------------------------------------


@pytest.mark.cpu
@settings(derandomize=True, max_examples=25, deadline=None, database=None, phases=[Phase.generate])
@given(st.data())
@pytest.mark.parametrize("row", ELEMENTWISE, ids=lambda row: row.name)
def test_every_combination(row, data):
    """Against separate operations, with parameters that torch's code steps among them."""
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3))
    arguments = {
        "max_norm": data.draw(st.sampled_from([None, 0.5, 5.0, math.inf])),
        "norm_type": data.draw(st.sampled_from([2, math.inf])),
        "clip_value": data.draw(st.sampled_from([None, 0.1, 10.0])),
        "skip_nonfinite": data.draw(st.booleans()),
        "zero_grad": data.draw(st.booleans()),
    }
    decay = data.draw(st.sampled_from(["off", None, 0.9]))
    copies_to = data.draw(st.sampled_from([None, *DTYPES]))
    by_torch = data.draw(st.booleans()) and not row.wants_sparse
    model, twin = model_of(row, dtypes), model_of(row, dtypes)
    if by_torch:
        for each in (model, twin):
            for i in range(3):
                each[i] = nn.Parameter(each[i].detach().as_subclass(Subclass))
    average = None if decay == "off" else AveragedModel(model, decay=decay)
    copies = None if copies_to is None else [p.detach().to(copies_to, copy=True) for p in model.parameters()]

    def make(each, **own):
        params = list(each.parameters())
        groups = [{"params": params[:3]}, {"params": params[3:]}]
        return row.ours(groups, **settings_of(row), **own)

    with torch.no_grad():
        optimizer, bare = make(model, **arguments, average=average, copy_to=copies), make(twin)
        new_state = bare._new_state
        bare._new_state = lambda group, p, grad, name: new_state(group, p, grad.to(p.dtype), name)
        for step in range(3):
            bad = data.draw(st.integers(0, 5)) == 0
            for each in (model, twin):
                give_gradients(row, each, step)
                if bad:
                    grad = list(each.parameters())[-1].grad
                    (grad._values() if grad.is_sparse else grad).view(-1)[0] = math.inf
            old = [] if average is None else [numbers(p) for p in average.module.parameters()]
            weight = None if average is None else average._step_weight(optimizer)
            optimizer.step()
            report = optimizer.last_step
            asked = arguments["max_norm"] is not None or arguments["skip_nonfinite"]
            skipped = bad and arguments["skip_nonfinite"]
            norm = norm_of(twin.parameters(), largest=arguments["norm_type"] != 2)
            assert report is None or report.skipped == skipped
            if asked:
                assert report.grad_norm == pytest.approx(norm, rel=1e-12)
            if skipped:
                assert_same_optimizers(optimizer, bare)
            else:
                coefficient = 1.0 if report is None else report.coefficient
                params = list(twin.parameters())
                twin_step(bare, params, coefficient=coefficient, clip_value=arguments["clip_value"])
                assert_same_optimizers(optimizer, bare)
                if average is not None:
                    assert_averages(average.module.parameters(), old, model.parameters(), weight, lambda got: got.dtype)
                if copies is not None:
                    for copied, p in zip(copies, model.parameters(), strict=True):
                        assert torch.allclose(copied, p.detach().to(copies_to), rtol=0, atol=0, equal_nan=True)
            if arguments["zero_grad"]:
                assert not any(p.grad.to_dense().count_nonzero() for p in model.parameters())
            if bad and not skipped:
                break


@pytest.mark.parametrize("row", WITH_TAIL, ids=lambda row: row.name)
def test_lookahead_with_the_tail(row):
    def make(model, **own):
        return onepass.Lookahead(row.ours(model.parameters(), **settings_of(row), **own), k=2, alpha=0.5)

    model, twin = model_of(row), model_of(row)
    average = AveragedModel(model, decay=0.5)
    copies = [p.detach().bfloat16() for p in model.parameters()]
    optimizer = make(model, max_norm=1.0, skip_nonfinite=True, average=average, copy_to=copies, zero_grad=True)
    bare = make(twin)
    for step in range(6):
        for each in (model, twin):
            give_gradients(row, each, step)
        if step == 3:
            next(iter(model.parameters())).grad.fill_(math.inf) if not row.wants_sparse else None
        skipped = step == 3 and not row.wants_sparse
        old = [numbers(p) for p in average.module.parameters()]
        weight = average._step_weight(optimizer.optimizer)
        optimizer.step()
        assert optimizer.optimizer.last_step.skipped == skipped
        if not skipped:
            twin_step(bare, list(twin.parameters()), coefficient=optimizer.optimizer.last_step.coefficient)
            assert_averages(average.module.parameters(), old, model.parameters(), weight, lambda got: got.dtype)
        assert_same_bits(model.parameters(), twin.parameters())
        assert_same_bits(copies, [p.detach().bfloat16() for p in model.parameters()])


# GradScaler does not take the sparse gradients of a CPU.
@pytest.mark.parametrize("row", [row for row in WITH_TAIL if not row.wants_sparse], ids=lambda row: row.name)
def test_grad_scaler(row):
    optimizer, bare, model, twin = pair_of(row, max_norm=1.0, zero_grad=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        for each in (model, twin):
            give_gradients(row, each, step)
        scaler.scale(torch.zeros(()))
        for p in model.parameters():
            p.grad = p.grad * 1024.0
        if step == 2:
            next(iter(model.parameters())).grad.fill_(math.inf)
        scaler.step(optimizer)
        scaler.update(1024.0)
        assert optimizer.last_step.skipped == (step == 2)
        assert not any(p.grad.count_nonzero() for p in model.parameters())
        if step != 2:
            assert optimizer.last_step.grad_norm == pytest.approx(norm_of(twin.parameters()), rel=1e-12)
            twin_step(bare, list(twin.parameters()), coefficient=optimizer.last_step.coefficient)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_grad_scaler_is_left_alone_where_nothing_depends_on_skipped_steps():
    def scales(**arguments):
        optimizer = onepass.SGD([nn.Parameter(torch.ones(2))], **arguments)
        for each in (optimizer, copy.deepcopy(optimizer)):
            found = getattr(each, "_step_supports_amp_scaling", False)
        return found

    assert scales(max_norm=1.0)
    assert scales(zero_grad=True)
    assert not scales(clip_value=1.0)
    assert not scales(copy_to=[torch.zeros(2)])


def test_closures_function_transforms_and_tensor_subclasses():
    class Sub(torch.Tensor):
        pass

    torch.manual_seed(0)
    plain = nn.Parameter(torch.randn(4, 3))
    sub = nn.Parameter(torch.randn(4, 3).as_subclass(Sub))
    optimizer = onepass.AdamW([plain, sub], lr=0.1, max_norm=1.0)

    def closure():
        optimizer.zero_grad()
        loss = (plain.square().sum() + sub.as_subclass(torch.Tensor).square().sum()) * 3
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert optimizer.last_step.grad_norm == pytest.approx(norm_of([plain, sub]), rel=1e-12)

    p = nn.Parameter(torch.ones(3))
    functional = onepass.SGD([p], lr=1.0, max_norm=1.0)
    p.grad = torch.full((3,), 5.0)
    torch.func.vmap(lambda x: (functional.step(), x)[1])(torch.zeros(2))
    torch.testing.assert_close(p.detach(), 1 - p.grad / (norm_of([p]) + 1e-6))


# -- arguments and copies --------------------------------------------------------------------------------------------


def test_without_the_arguments_nothing_is_reported():
    p = nn.Parameter(torch.ones(3))
    optimizer = onepass.SGD([p], lr=0.1)
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.last_step is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_norm": -1.0}, ValueError, "AdamW: max_norm must be >= 0, got -1.0"),
        ({"max_norm": math.nan}, ValueError, "AdamW: max_norm must be >= 0, got nan"),
        ({"max_norm": "1"}, TypeError, "AdamW: max_norm must be a number"),
        ({"max_norm": onepass.ZClip}, TypeError, r"must be a number or a policy, got the class ZClip: pass ZClip\(\)$"),
        ({"max_norm": 1.0, "norm_type": torch.ones(2)}, ValueError, "AdamW: norm_type must be 2 or inf"),
        ({"max_norm": 1.0, "norm_type": 1}, ValueError, "AdamW: norm_type must be 2 or inf"),
        ({"clip_value": -0.5}, ValueError, "AdamW: clip_value must be >= 0, got -0.5"),
        ({"average": nn.Linear(2, 2)}, TypeError, "AdamW: average must be a onepass.swa_utils.AveragedModel"),
        ({"average": swa_utils.AveragedModel(nn.Linear(2, 2))}, TypeError, "got torch's AveragedModel$"),
        ({"average": AveragedModel(nn.Linear(2, 2))}, ValueError, "AdamW: average has no averages of this optimizer"),
        ({"copy_to": [torch.zeros(2, 2)]}, ValueError, "AdamW: copy_to must have 2 tensors"),
        ({"copy_to": [torch.zeros(2, 2), torch.zeros(3)]}, ValueError, r"copy_to\[1\] has shape \[3\], its"),
        ({"copy_to": 3}, TypeError, "AdamW: copy_to must be tensors or a module, got the int 3"),
        ({"copy_to": [torch.zeros(1).expand(2, 2), torch.zeros(2)]}, ValueError, r"copy_to\[0\] must have memory"),
        ({"copy_to": [torch.zeros(2, 2), None]}, TypeError, r"copy_to\[1\] must be a tensor"),
    ],
)
def test_invalid_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        onepass.AdamW(nn.Linear(2, 2).parameters(), **arguments)


def test_a_parameter_cannot_be_its_own_copy():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^AdamW: copy_to\[0\] must be another tensor than its parameter"):
        onepass.AdamW(model.parameters(), copy_to=model)


def test_copy_to_a_module_of_several_groups_needs_names():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="named_parameters"):
        onepass.AdamW([{"params": [p]} for p in model.parameters()], copy_to=copy.deepcopy(model))


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_of_the_optimizer_keep_the_tail(through):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    copies = [p.detach().bfloat16() for p in model.parameters()]
    average = AveragedModel(model, decay=0.5)
    optimizer = onepass.AdamW(
        model.parameters(), lr=0.1, max_norm=0.1, clip_value=0.05, average=average, copy_to=copies, zero_grad=True
    )
    other_model, other_average, other_copies, other = through((model, average, copies, optimizer))
    start = [p.detach().clone() for p in model.parameters()]
    other_average.update_parameters(other_model)  # a copied average does not know its model; this is a round, too
    for each, by in ((model, optimizer), (other_model, other)):
        for p in each.parameters():
            p.grad = torch.ones_like(p)
        by.step()
        assert by.last_step.grad_norm == pytest.approx(norm_of([nn.Parameter(torch.ones(15))]) or math.sqrt(15))
    assert_same_bits(model.parameters(), other_model.parameters())
    assert_same_bits(copies, other_copies)
    assert_same_bits(average.module.parameters(), model.parameters())
    assert (average.n_averaged, other_average.n_averaged) == (1, 2)
    for before, p, averaged in zip(start, model.parameters(), other_average.module.parameters(), strict=True):
        torch.testing.assert_close(averaged, (before + p) / 2)


def test_parameters_that_are_added_later_are_averaged():
    model = nn.Linear(4, 3)
    average = AveragedModel(model, decay=0.5)
    optimizer = onepass.SGD([model.weight], lr=0.1, average=average)
    optimizer.add_param_group({"params": [model.bias]})
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = [numbers(p) for p in average.module.parameters()]
        weight = average._step_weight(optimizer)
        optimizer.step()
        assert_averages(average.module.parameters(), before, model.parameters(), weight, lambda got: got.dtype)


def test_step_in_backward_refuses_what_needs_all_gradients():
    model = nn.Linear(2, 2)
    for arguments, name in (
        ({"max_norm": 1.0}, "max_norm"),
        ({"skip_nonfinite": True}, "skip_nonfinite"),
        ({"average": AveragedModel(model)}, "average"),
        ({"copy_to": copy.deepcopy(model)}, "copy_to"),
        ({"zero_grad": True}, "zero_grad"),
    ):
        with pytest.raises(ValueError, match=f"{name} needs all parameters of a step"):
            onepass.step_in_backward(onepass.SGD(model.parameters(), lr=0.1, **arguments))
