"""Master weights: 16-bit parameters whose steps have the bits of those of float32 parameters.

A twin has float32 parameters of the same values and is given the same gradients. The masters and all other states must
have the bits of the twin's parameters and states.
"""

import copy
import gc
import io
import math
import pickle

import numpy as np
import onepass
import pytest
import torch
from cases import ROWS
from onepass.optimizers.master import master_of, write_master
from onepass.swa_utils import AveragedModel
from reference import bits
from torch import nn

WITH_MASTER = [row for row in ROWS if getattr(row.ours, "is_elementwise", False)]
DENSE = [row for row in WITH_MASTER if not row.wants_sparse]
ADAMW = next(row for row in ROWS if row.name == "AdamW")
KINDS = [("split", torch.bfloat16), ("float32", torch.bfloat16), ("float32", torch.float16)]
NAMES = {"split": "master_low", "float32": "master"}
SHAPES = [(), (5,), (4, 3), (2, 0), (1100,), (7, 300)]

for_kinds = pytest.mark.parametrize(("master", "dtype"), KINDS, ids=["split", "float32", "float32 of float16"])
for_masters = pytest.mark.parametrize("master", ["split", "float32"])


def leaves(dtype, shapes=SHAPES, seed=0):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def widened(params):
    return [nn.Parameter(p.detach().float()) for p in params]


def give(row, params, twins, seed, scale=1.0):
    """Gives the twins the same gradients in float32."""
    torch.manual_seed(seed)
    for p, q in zip(params, twins, strict=True):
        grad = (torch.randn(p.shape) * scale).to(p.dtype)
        if row.wants_sparse and p.ndim:
            grad = grad.to_sparse(1)
        p.grad, q.grad = grad, grad.float()


def pair(row, master, dtype, shapes=SHAPES, **kwargs):
    """The optimizer with masters, and its twin."""
    params = leaves(dtype, [shape for shape in shapes if shape] if row.wants_sparse else shapes)
    kwargs = {**row.full, **kwargs}
    return row.ours(params, **kwargs, master=master), row.ours(widened(params), **kwargs), params


def twins_of(optimizer):
    return [q for group in optimizer.param_groups for q in group["params"]]


def rounded(master, dtype, kind):
    """The copy of a master: of a split one rounded away from zero in a tie."""
    if kind == "float32":
        return master.detach().to(dtype)
    pattern = master.detach().numpy().view(np.uint32).astype(np.uint64)
    high = ((pattern + 0x8000) >> 16).astype(np.uint16).view(np.int16)
    return torch.from_numpy(np.array(high)).view(torch.bfloat16)


def assert_same(optimizer, twin):
    """Masters are the twin's parameters, parameters their rounded copies, and states the twin's."""
    for group, twins in zip(optimizer.param_groups, twin.param_groups, strict=True):
        kind = group["master"]
        for p, q in zip(group["params"], twins["params"], strict=True):
            state = dict(optimizer.state[p])
            assert bits(master_of(p, state, NAMES[kind])) == bits(q)
            assert bits(p) == bits(rounded(q, p.dtype, kind))
            held = state.pop(NAMES[kind])
            assert (held.shape, held.stride()) == (p.shape, p.stride())
            assert held.dtype == (torch.int16 if kind == "split" else torch.float32)
            assert state.keys() == twin.state[q].keys()
            for name, value in state.items():
                other = twin.state[q][name]
                same = bits(value) == bits(other) if isinstance(value, torch.Tensor) else value == other
                assert same, name


def run(row, optimizer, twin, steps):
    for step in steps:
        give(row, twins_of(optimizer), twins_of(twin), step)
        optimizer.step()
        twin.step()
        assert_same(optimizer, twin)


# -- the bits of float32 ---------------------------------------------------------------------------------------------


@for_kinds
@pytest.mark.parametrize("row", WITH_MASTER, ids=lambda row: row.name)
def test_the_bits_of_float32(row, master, dtype, kernels_only):
    optimizer, twin, _ = pair(row, master, dtype)
    run(row, optimizer, twin, range(6))


VARIANTS = [
    pytest.param(row, kwargs, id=f"{row.name}-{name}")
    for row in WITH_MASTER
    for name, kwargs in {**row.variants, **row.own_variants}.items()
]


@for_masters
@pytest.mark.parametrize(("row", "kwargs"), VARIANTS)
def test_every_variant(row, kwargs, master):
    params = leaves(torch.bfloat16, [(4, 3), (300,)])
    optimizer = row.ours(params, **copy.deepcopy(kwargs), master=master)
    twin = row.ours(widened(params), **copy.deepcopy(kwargs))
    run(row, optimizer, twin, range(3))


def test_the_parameter_alone_would_stand_still():
    p, q = nn.Parameter(torch.ones(3).bfloat16()), nn.Parameter(torch.ones(3).bfloat16())
    with_master, without = onepass.SGD([p], lr=1e-4, master="split"), onepass.SGD([q], lr=1e-4)
    for _ in range(100):
        p.grad = q.grad = torch.ones(3).bfloat16()
        with_master.step()
        without.step()
    assert torch.equal(q, torch.ones_like(q))
    assert torch.equal(p, torch.full_like(p, 0.99))


def test_nothing_is_remembered_of_parameters_that_are_gone():
    gc.collect()
    before = dict(onepass._core.master_versions)
    optimizer = onepass.AdamW(leaves(torch.bfloat16), master="split")
    params = optimizer.param_groups[0]["params"]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    ids = {id(p) for p in params}
    assert ids <= onepass._core.master_versions.keys()
    del optimizer, params, p
    gc.collect()
    assert onepass._core.master_versions == before


@pytest.mark.cpu
@for_masters
@pytest.mark.parametrize("isa", [name for name, supported in onepass._core.isas().items() if supported])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_instruction_set_and_number_of_threads(isa, threads, master, all_threads):
    onepass._core.force_isa(isa)
    torch.set_num_threads(threads)
    optimizer, twin, _ = pair(ADAMW, master, torch.bfloat16, [(300, 1003)])
    run(ADAMW, optimizer, twin, range(3))


def strided(values, kind):
    rows, columns = values.shape
    if kind == "transposed":
        made = torch.empty(columns, rows, dtype=values.dtype).t()
    elif kind == "columns of a wider matrix":
        made = torch.empty(rows, columns + 5, dtype=values.dtype)[:, 2 : columns + 2]
    else:  # misaligned
        size = values.element_size()
        storage = torch.empty(rows * columns * size + size, dtype=torch.uint8)
        made = storage[size:].view(values.dtype).view(rows, columns)
    return made.copy_(values)


@for_kinds
@pytest.mark.parametrize("kind", ["transposed", "columns of a wider matrix", "one element further"])
def test_every_layout(kind, master, dtype, kernels_only):
    torch.manual_seed(0)
    values = torch.randn(37, 29).to(dtype)
    p, q = nn.Parameter(strided(values, kind)), nn.Parameter(values.float())
    optimizer, twin = onepass.AdamW([p], master=master), onepass.AdamW([q])
    for step in range(3):
        torch.manual_seed(step)
        grad = torch.randn(37, 29).to(dtype)
        p.grad, q.grad = grad, grad.float()
        optimizer.step()
        twin.step()
        assert torch.equal(master_of(p, optimizer.state[p], NAMES[master]), q)


@for_masters
def test_special_values(master):
    """A step that changes nothing keeps every master, also one that rounds to infinity."""
    p = nn.Parameter(torch.zeros(9).bfloat16())
    optimizer = onepass.SGD([p], lr=0.0, master=master)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    values = torch.tensor([0.0, -0.0, math.inf, -math.inf, 3.4e38, -3.4e38, 1.0 + 2**-8, 1.0 + 3 * 2**-8, math.nan])
    write_master(p, optimizer.state[p], NAMES[master], values)
    optimizer.step()
    after = master_of(p, optimizer.state[p], NAMES[master])
    assert bits(after[:8]) == bits(values[:8])
    assert after[8].isnan()
    assert p[8].isnan()


def test_other_parameters_are_left_alone():
    dtypes = [torch.float32, torch.float64, torch.complex64, torch.bfloat16]
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes]
    optimizer = onepass.AdamW(params, master="split")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [("master_low" in optimizer.state[p]) for p in params] == [False, False, False, True]
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [*dtypes[:3], torch.float32]


@for_masters
def test_groups_may_have_their_own(master):
    p, q, r = leaves(torch.bfloat16, [(3,)] * 3)
    optimizer = onepass.AdamW([{"params": [p]}, {"params": [q], "master": None}], master=master)
    optimizer.add_param_group({"params": [r], "master": "float32"})
    for each in (p, q, r):
        each.grad = torch.ones_like(each)
    optimizer.step()
    assert NAMES[master] in optimizer.state[p]
    assert not {*NAMES.values()} & optimizer.state[q].keys()
    assert optimizer.state[q]["exp_avg"].dtype == torch.bfloat16
    assert "master" in optimizer.state[r]


@for_masters
def test_state_dtype_is_respected(master):
    p = nn.Parameter(torch.ones(3).bfloat16())
    optimizer = onepass.AdamW([p], master=master, state_dtype=torch.bfloat16)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16


def test_without_the_argument_there_is_no_key():
    assert "master" not in onepass.AdamW([nn.Parameter(torch.zeros(1))]).param_groups[0]


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["Split", True, torch.float32, 1.0])
def test_bad_values(bad):
    p = nn.Parameter(torch.zeros(3).bfloat16())
    with pytest.raises(ValueError, match="master must be 'split', 'float32' or None, got"):
        onepass.AdamW([p], master=bad)
    with pytest.raises(ValueError, match="group 0: master must be"):
        onepass.AdamW([{"params": [p], "master": bad}])
    optimizer = onepass.AdamW([p])
    with pytest.raises(ValueError, match="group 1: master must be"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "master": bad})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["master"] = bad
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="group 0: master must be"):
        optimizer.step()


def test_split_needs_bfloat16():
    p = nn.Parameter(torch.zeros(3).half())
    with pytest.raises(ValueError, match=r"master='split' needs bfloat16 parameters.*use master='float32'"):
        onepass.AdamW([p], master="split")
    optimizer = onepass.AdamW([p])
    optimizer.param_groups[0]["master"] = "split"
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match='master="split" needs a bfloat16 parameter'):
        optimizer.step()


@pytest.mark.parametrize("cls", [onepass.Adafactor, onepass.CAME, onepass.Muon, onepass.NorMuon])
def test_classes_without_masters(cls):
    p = nn.Parameter(torch.zeros(3, 3).bfloat16())
    with pytest.raises(ValueError, match="master must be None"):
        cls([p], master="split")
    with pytest.raises(ValueError, match="master must be None"):
        cls([{"params": [p], "master": "float32"}])


@for_masters
@pytest.mark.parametrize("bad", [torch.float16, torch.float64, torch.int32])
def test_a_state_of_another_dtype(master, bad):
    p = nn.Parameter(torch.zeros(3).bfloat16())
    optimizer = onepass.AdamW([p], master=master)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = p.detach().clone()
    optimizer.state[p][NAMES[master]] = torch.zeros(3, dtype=bad)
    with pytest.raises(ValueError, match=f"its state {NAMES[master]} has dtype {bad}"):
        optimizer.step()
    assert torch.equal(p, before)


@for_masters
def test_differentiable_is_refused(master):
    p = nn.Parameter(torch.zeros(3).bfloat16())
    optimizer = onepass.AdamW([p], master=master, differentiable=True)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="master cannot be given with differentiable=True"):
        optimizer.step()


# -- changes by the user ---------------------------------------------------------------------------------------------


def change(params, twins):
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            p.mul_(0.75)
            q.copy_(p)


@for_kinds
@pytest.mark.parametrize("row", WITH_MASTER, ids=lambda row: row.name)
def test_a_changed_parameter_is_the_new_master(row, master, dtype):
    optimizer, twin, params = pair(row, master, dtype)
    run(row, optimizer, twin, range(3))
    change(params, twins_of(twin))
    run(row, optimizer, twin, range(3, 6))


@for_masters
def test_a_change_is_noticed_although_a_group_was_added(master):
    optimizer, twin, params = pair(ADAMW, master, torch.bfloat16)
    run(ADAMW, optimizer, twin, range(2))
    change(params, twins_of(twin))
    new = leaves(torch.bfloat16, [(4,)])
    optimizer.add_param_group({"params": new})
    twin.add_param_group({"params": widened(new)})
    run(ADAMW, optimizer, twin, range(2, 4))


@for_masters
def test_views_of_one_tensor(master):
    """They share a version, which a step of one of them changes."""
    flat = torch.randn(20).bfloat16()
    params = [nn.Parameter(flat[:8]), nn.Parameter(flat[8:])]
    optimizer, twin = onepass.AdamW(params, **ADAMW.full, master=master), onepass.AdamW(widened(params), **ADAMW.full)
    for step in range(6):
        give(ADAMW, params, twins_of(twin), step)
        if step % 2:
            params[1].grad = twins_of(twin)[1].grad = None
        optimizer.step()
        twin.step()
        assert_same(optimizer, twin)


@for_masters
def test_one_changed_element(master):
    p = nn.Parameter(torch.ones(4).bfloat16())
    optimizer = onepass.SGD([p], lr=2.0**-12, master=master)
    p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.no_grad():
        p[1] = 5.0
    p.grad.zero_()
    optimizer.step()
    after = master_of(p, optimizer.state[p], NAMES[master])
    kept = 1.0 - 2.0**-12 if master == "float32" else 1.0  # a version does not say which element has changed
    assert after.tolist() == [kept, 5.0, kept, kept]


@for_masters
def test_what_only_reads_changes_nothing(master):
    optimizer, twin, params = pair(ADAMW, master, torch.bfloat16)
    run(ADAMW, optimizer, twin, range(2))
    held = [optimizer.state[p][NAMES[master]].clone() for p in params]
    change(params, twins_of(twin))
    onepass.explain(optimizer)
    for p, before in zip(params, held, strict=True):
        assert torch.equal(optimizer.state[p][NAMES[master]], before)


@for_masters
def test_a_skipped_step_keeps_the_masters(master):
    optimizer, twin, params = pair(ADAMW, master, torch.bfloat16, max_norm=1e9, skip_nonfinite=True)
    run(ADAMW, optimizer, twin, range(2))
    params[1].grad = torch.full_like(params[1], math.inf)
    optimizer.step()
    assert optimizer.last_step.skipped
    assert_same(optimizer, twin)
    run(ADAMW, optimizer, twin, range(2, 4))


@for_masters
@pytest.mark.parametrize("ends", ["skipped", "error"])
def test_a_step_that_is_not_made_changes_no_master_of_a_changed_parameter(ends, master):
    optimizer, twin, params = pair(ADAMW, master, torch.bfloat16, max_norm=1e9, skip_nonfinite=True)
    run(ADAMW, optimizer, twin, range(2))
    change(params, twins_of(twin))
    held = [optimizer.state[p][NAMES[master]].clone() for p in params]
    if ends == "skipped":
        params[1].grad = torch.full_like(params[1], math.inf)
        optimizer.step()
        assert optimizer.last_step.skipped
    else:
        exp_avg = optimizer.state[params[-1]]["exp_avg"]
        optimizer.state[params[-1]]["exp_avg"] = exp_avg.unsqueeze(0)
        with pytest.raises(ValueError, match="exp_avg"):
            optimizer.step()
        optimizer.state[params[-1]]["exp_avg"] = exp_avg
    for p, before in zip(params, held, strict=True):
        assert torch.equal(optimizer.state[p][NAMES[master]], before)
    run(ADAMW, optimizer, twin, range(2, 4))


# -- checkpoints -----------------------------------------------------------------------------------------------------


def saved_and_read(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@for_kinds
@pytest.mark.parametrize("row", WITH_MASTER, ids=lambda row: row.name)
def test_resumed(row, master, dtype):
    optimizer, twin, params = pair(row, master, dtype)
    run(row, optimizer, twin, range(3))
    checkpoint = saved_and_read(optimizer)
    others = [nn.Parameter(torch.zeros_like(p)) for p in params]
    resumed = row.ours(others, **row.full, master=master)
    give(row, others, twins_of(twin), 99)
    resumed.step()
    for order in (0, 1):
        if order == 0:
            resumed.load_state_dict(checkpoint)
        with torch.no_grad():
            for p, other in zip(params, others, strict=True):
                other.copy_(p)
        if order == 1:
            resumed.load_state_dict(checkpoint)
        assert_same(resumed, twin)
    run(row, resumed, twin, range(3, 5))


@for_masters
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_saved_after_a_change(master, way):
    """What is resumed has the low bits that the next step would have taken: none, of a changed parameter."""
    optimizer, twin, params = pair(ADAMW, master, torch.bfloat16)
    run(ADAMW, optimizer, twin, range(3))
    held = [optimizer.state[p][NAMES[master]].clone() for p in params]
    change(params[:3], twins_of(twin)[:3])
    if way == "state_dict":
        resumed = onepass.AdamW([nn.Parameter(p.detach().clone()) for p in params], **ADAMW.full, master=master)
        resumed.load_state_dict(saved_and_read(optimizer))
    else:
        resumed = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    for p, before in zip(params, held, strict=True):  # saving changes nothing
        assert torch.equal(optimizer.state[p][NAMES[master]], before)
    run(ADAMW, resumed, copy.deepcopy(twin), range(3, 5))
    run(ADAMW, optimizer, twin, range(3, 5))


@for_masters
def test_a_checkpoint_of_torchs(master):
    params = leaves(torch.bfloat16)
    theirs = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    theirs.step()
    optimizer = onepass.AdamW(params, master=master)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert optimizer.param_groups[0]["master"] == master
    twin = onepass.AdamW(widened(params), state_dtype=torch.float32)
    twin.load_state_dict(copy.deepcopy(theirs.state_dict()))
    run(ADAMW, optimizer, twin, range(3))


@for_masters
def test_a_checkpoint_brings_its_masters_along(master):
    optimizer, twin, params = pair(ADAMW, master, torch.bfloat16)
    run(ADAMW, optimizer, twin, range(3))
    other = onepass.AdamW(params, **ADAMW.full)
    other.load_state_dict(saved_and_read(optimizer))
    run(ADAMW, other, twin, range(3, 5))


def test_a_checkpoint_with_a_value_that_there_is_not():
    optimizer, _, _ = pair(ADAMW, "split", torch.bfloat16)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["master"] = "third"
    with pytest.raises(ValueError, match="master must be"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["master"] == "split"


@for_masters
def test_copied(master):
    optimizer, twin, _ = pair(ADAMW, master, torch.bfloat16)
    run(ADAMW, optimizer, twin, range(3))
    copied = copy.deepcopy(optimizer)
    run(ADAMW, copied, twin, range(3, 5))
    with torch.no_grad():  # and a copy notices changes
        change(twins_of(copied), twins_of(twin))
    run(ADAMW, copied, twin, range(5, 7))


# -- fallbacks -------------------------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    """A tensor that kernels do not step."""


@for_kinds
@pytest.mark.parametrize("row", DENSE, ids=lambda row: row.name)
def test_where_torchs_implementation_steps(row, master, dtype):
    torch.manual_seed(0)
    values = torch.randn(40).to(dtype)
    p = values.clone().as_subclass(Subclass).requires_grad_()
    q = nn.Parameter(values.float())
    optimizer, twin = row.ours([p], **row.full, master=master), row.theirs([q], **row.full)
    for step in range(4):
        torch.manual_seed(step)
        grad = torch.randn(40).to(dtype)
        p.grad, q.grad = grad.as_subclass(Subclass), grad.float()
        if step == 2:
            change([p], [q])
        optimizer.step()
        twin.step()
        master_now = master_of(p, optimizer.state[p], NAMES[master]).as_subclass(torch.Tensor)
        torch.testing.assert_close(master_now, q.detach(), rtol=1e-6, atol=1e-7)
        assert bits(p.as_subclass(torch.Tensor).detach()) == bits(rounded(master_now, dtype, master))
        for name, value in twin.state[q].items():
            own = optimizer.state[p][name]
            assert not isinstance(value, torch.Tensor) or own.dtype == value.dtype


@for_masters
def test_kernels_and_torchs_implementation_in_turn(master):
    optimizer, twin, params = pair(ADAMW, master, torch.bfloat16, [(40,)])
    run(ADAMW, optimizer, twin, range(2))
    own, q = params[0], twins_of(twin)[0]
    with torch.autograd.forward_ad.dual_level():  # torch's implementation steps within this context
        give(ADAMW, params, [q], 2)
        optimizer.step()
        twin.step()
    assert bits(master_of(own, optimizer.state[own], NAMES[master])) == bits(q)
    run(ADAMW, optimizer, twin, range(3, 5))


# -- with everything else --------------------------------------------------------------------------------------------


@for_kinds
@pytest.mark.parametrize("row", DENSE, ids=lambda row: row.name)
def test_with_a_tail(row, master, dtype):
    model, wide = nn.ParameterList(leaves(dtype)), nn.ParameterList(widened(leaves(dtype)))
    averages = [AveragedModel(each, decay=0.9).float() for each in (model, wide)]
    dtypes = [torch.float32, dtype]
    copies = [torch.zeros(p.shape, dtype=dtypes[i % 2]) for i, p in enumerate(model)]
    twin_copies = [torch.zeros(p.shape) for p in model]
    arguments = {"max_norm": 0.5, "clip_value": 0.25, "zero_grad": True}
    optimizer = row.ours([*model], **row.full, **arguments, master=master, average=averages[0], copy_to=copies)
    twin = row.ours([*wide], **row.full, **arguments, average=averages[1], copy_to=twin_copies)
    for step in range(4):
        give(row, [*model], [*wide], step)
        optimizer.step()
        twin.step()
        assert_same(optimizer, twin)
        assert optimizer.last_step.coefficient == twin.last_step.coefficient
        assert not any(p.grad.any() for p in model)
        for a, b in zip(averages[0].module.parameters(), averages[1].module.parameters(), strict=True):
            assert a.dtype == torch.float32
            assert bits(a) == bits(b)
        for p, each, want in zip(model, copies, twin_copies, strict=True):
            assert bits(each) == bits(want if each.dtype == torch.float32 else p)


def test_a_copy_has_the_bits_of_the_parameter_in_a_tie():
    p = nn.Parameter(torch.ones(3).bfloat16())
    copies = [torch.zeros(3).bfloat16()]
    optimizer = onepass.SGD([p], lr=2.0**-8, master="split", copy_to=copies)
    p.grad = torch.full_like(p, -1.0)
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, 1.0 + 2**-7))  # away from zero; to even, it would be 1
    assert torch.equal(copies[0], p)


@for_masters
def test_a_tail_where_torchs_implementation_steps(master):
    p = torch.ones(3).bfloat16().as_subclass(Subclass).requires_grad_()
    copies = [torch.zeros(3)]
    optimizer = onepass.SGD([p], lr=2.0**-12, master=master, copy_to=copies)
    p.grad = torch.ones(3).bfloat16().as_subclass(Subclass)
    optimizer.step()
    assert copies[0].tolist() == [1.0 - 2.0**-12] * 3


@for_kinds
@pytest.mark.parametrize("row", DENSE, ids=lambda row: row.name)
def test_within_lookahead(row, master, dtype):
    optimizer, twin, params = pair(row, master, dtype)
    ahead, twin_ahead = (onepass.Lookahead(each, k=2, alpha=0.3) for each in (optimizer, twin))
    for step in range(5):
        give(row, params, twins_of(twin), step)
        ahead.step()
        twin_ahead.step()
        assert_same(optimizer, twin)
        with ahead.slow_weights(), twin_ahead.slow_weights():
            for p, q in zip(params, twins_of(twin), strict=True):
                torch.testing.assert_close(p, q.to(dtype))
    resumed = onepass.Lookahead(row.ours(params, **row.full, master=master), k=2, alpha=0.3)
    resumed.load_state_dict(saved_and_read(ahead))
    for step in range(5, 8):
        give(row, params, twins_of(twin), step)
        resumed.step()
        twin_ahead.step()
        assert_same(resumed.optimizer, twin)


@for_masters
def test_lookahead_begun_later_and_where_torchs_implementation_steps(master):
    optimizer, twin, params = pair(ADAMW, master, torch.bfloat16, [(40,)])
    run(ADAMW, optimizer, twin, range(2))
    ahead, twin_ahead = (onepass.Lookahead(each, k=2, alpha=0.3) for each in (optimizer, twin))
    for step in range(2, 6):
        with torch.autograd.forward_ad.dual_level():
            give(ADAMW, params, twins_of(twin), step)
            ahead.step()
            twin_ahead.step()
        assert_same(optimizer, twin)


@for_masters
def test_step_in_backward(master):
    model, other = nn.Linear(4, 3).bfloat16(), nn.Linear(4, 3).bfloat16()
    other.load_state_dict(model.state_dict())
    optimizer, plain = (onepass.AdamW(each.parameters(), master=master) for each in (model, other))
    handle = onepass.step_in_backward(optimizer)
    x = torch.randn(5, 4).bfloat16()
    for step in range(4):
        for each in (model, other):
            each(x).square().sum().backward()
        optimizer.step()
        plain.step()
        plain.zero_grad()
        if step == 1:
            saved = saved_and_read(optimizer)
            with torch.no_grad():
                for p in (*model.parameters(), *other.parameters()):
                    p.add_(1.0)
        if step == 2:  # a changed parameter and its checkpoint again
            optimizer.load_state_dict(saved)
            plain.load_state_dict(saved)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert bits(p) == bits(q)
            assert bits(optimizer.state[p][NAMES[master]]) == bits(plain.state[q][NAMES[master]])
    handle.remove()


@for_masters
def test_with_grad_scaler(master):
    optimizer, twin, params = pair(ADAMW, master, torch.bfloat16)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    for step in range(4):
        give(ADAMW, params, twins_of(twin), step, scale=2.0**10)
        if step == 2:
            params[1].grad[0] = twins_of(twin)[1].grad[0] = math.inf
        for scaler, each in zip(scalers, (optimizer, twin), strict=True):
            scaler.scale(torch.ones(1))
            scaler.step(each)
            scaler.update()
        assert_same(optimizer, twin)


@for_masters
def test_evaluated_with_averages(master):
    model = nn.Linear(4, 3).bfloat16()
    params = [*model.parameters()]
    average = AveragedModel(model, decay=0.9)
    optimizer = onepass.AdamW(params, **ADAMW.full, master=master, average=average)
    twin = onepass.AdamW(widened(params), **ADAMW.full)
    run(ADAMW, optimizer, twin, range(2))
    with average.swapped(model):
        onepass.explain(optimizer)
    run(ADAMW, optimizer, twin, range(2, 4))


@for_masters
def test_after_lr_find(master):
    model = nn.Linear(4, 3).bfloat16()
    params = [*model.parameters()]
    optimizer, twin = onepass.AdamW(params, **ADAMW.full, master=master), onepass.AdamW(widened(params), **ADAMW.full)
    run(ADAMW, optimizer, twin, range(2))
    batches = [(torch.randn(8, 4).bfloat16(), torch.randn(8, 3).bfloat16())]
    onepass.lr_find(model, optimizer, nn.functional.mse_loss, batches, steps=10, progress=False)
    run(ADAMW, optimizer, twin, range(2, 4))


@for_masters
def test_sparse_gradients(master):
    p = nn.Parameter(torch.randn(50, 8).bfloat16())
    q = nn.Parameter(p.detach().float())
    optimizer, twin = onepass.AdamW([p], master=master), onepass.AdamW([q])
    for step in range(5):
        torch.manual_seed(step)
        indices, values = torch.randint(50, (1, 20)), torch.randn(20, 8).bfloat16()
        grad = torch.sparse_coo_tensor(indices, values, (50, 8), check_invariants=True)
        p.grad, q.grad = grad, grad.float()
        if step == 3:  # rows without an entry in this step, too
            change([p], [q])
        optimizer.step()
        twin.step()
        assert bits(master_of(p, optimizer.state[p], NAMES[master])) == bits(q)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (lambda p: [p], False),
        (lambda p: p, False),
        (lambda p: (each for each in [p]), False),
        (lambda p: [("w", p)], True),
        (lambda p: iter([("w", p)]), True),
    ],
    ids=["list", "tensor", "generator", "named", "generator of named"],
)
def test_a_group_of_float16_parameters_is_refused_by_split_masters(given, named):
    """However the parameters are given; a generator is not lost."""
    first, half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = onepass.AdamW([("v", first)] if named else [first], master="split")
    group = {"params": given(half)}
    with pytest.raises(
        ValueError, match="AdamW: group 1: master='split' needs bfloat16 parameters, but parameter 0 is"
    ):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({**group, "master": "float32"})
    assert optimizer.param_groups[1]["params"] == [half]


def zeroed_by_data(p):
    p.data.zero_()


def pruned(p):
    p.data.mul_(torch.arange(p.numel()).view(p.shape) % 2)


def exchanged(p):
    p.data = torch.zeros_like(p)


@pytest.mark.parametrize("change", [zeroed_by_data, pruned, exchanged])
@pytest.mark.parametrize("shape", [(5,), (1100,), (7, 300)], ids=str)
@pytest.mark.parametrize("by_torch", [False, True])
def test_zeros_that_are_written_unnoticed(change, shape, by_torch):
    """Negative low bits beside them would make NaN."""
    p = leaves(torch.bfloat16, [shape])[0]
    if by_torch:
        p = nn.Parameter(p.detach().as_subclass(type("Subclass", (torch.Tensor,), {})))
    optimizer = onepass.SGD([p], lr=1e-3, master="split")
    for step in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
        if step == 0:
            assert (optimizer.state[p]["master_low"] < 0).any()
            change(p)
            zeros = (p.detach() == 0).as_subclass(torch.Tensor)
    assert torch.isfinite(p).all()
    assert zeros.any()
    want = torch.tensor(-2e-3).to(torch.bfloat16)
    assert (p.detach().as_subclass(torch.Tensor)[zeros] == want).all()
