"""Clipping, skipping, averages, copies and zeroed gradients of steps over several processes.

A twin on each process has the whole tensors and the same arguments. Norms agree to the rounding of double, and the
report of a step is the same on all processes.
"""

import contextlib
import itertools
import math
import warnings
from unittest import mock

import onepass
import pytest
import torch
import torch.distributed as dist
from cases import ROW
from onepass.swa_utils import AveragedModel
from placements import own, own_of_both, spread, whole
from reference import only_kernels
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch's own parts
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import (
        PostLocalSGDOptimizer,
        ZeroRedundancyOptimizer,
        _apply_optimizer_in_backward,
    )


# -- what the functions that run in the processes share --------------------------------------------------------------

SHAPES = [(3, 5), (1, 4), (8, 2), (2, 0)]  # over 4 processes: uneven parts, and empty ones
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def line():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def square():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))


def of(mesh, *placements):
    return [(shape, mesh, list(each)) for shape in SHAPES for each in placements]


def plain():
    return [((4, 3), None, None), ((2,), None, None)]


# By name: the number of processes; the shape, mesh and placements of each parameter; the number of all-reduces of a
# step that measures. A 2-D mesh has one for each dimension over which a tensor is spread.
LAYOUTS = {
    "Shard(0) of 2": (2, lambda: of(line(), [Shard(0)]), 1),
    "Shard(0)": (4, lambda: of(line(), [Shard(0)]), 1),
    "Shard(1)": (4, lambda: of(line(), [Shard(1)]), 1),
    "replicated": (2, lambda: [*of(line(), [Replicate()]), *plain()], 0),
    "one process": (1, lambda: of(line(), [Shard(0)]), 0),
    "plain beside all": (4, lambda: [*plain(), *of(line(), [Shard(0)], [Replicate()], [Shard(1)])], 1),
    "hybrid": (4, lambda: of(square(), [Replicate(), Shard(0)]), 1),
    "2-D": (4, lambda: of(square(), *itertools.product([Shard(0), Shard(1), Replicate()], repeat=2)), 2),
    "two meshes": (4, lambda: [*of(line(), [Shard(0)]), *plain(), *of(square(), [Shard(1), Replicate()])], 2),
    "dimensions of a mesh": (4, lambda: [*of(square()["b"], [Shard(0)]), *of(square()["a"], [Shard(1)]), *plain()], 2),
}


def params_of(layout, dtype=torch.float64):
    torch.manual_seed(0)
    return [Parameter(spread(torch.randn(shape, dtype=dtype), *place)) for shape, *place in layout]


def give_gradients(params, layout, seed, scale=1.0):
    """Returns the whole gradients."""
    torch.manual_seed(seed)
    grads = [torch.randn(shape, dtype=p.dtype) * scale for p, (shape, *_) in zip(params, layout, strict=True)]
    for p, grad, (_, *place) in zip(params, grads, layout, strict=True):
        p.grad = spread(grad.clone(), *place)
    return grads


def twins_of(params):
    return [Parameter(whole(p)) for p in params]


def assert_same(actual, expected, **tolerance):
    pairs = [own_of_both(x, values) for x, values in zip(actual, expected, strict=True)]
    torch.testing.assert_close(
        [actual for actual, _ in pairs], [expected for _, expected in pairs], **(tolerance or CLOSE)
    )


def assert_same_report(actual, expected):
    """Equal, but for the rounding of double."""
    close = {"rel": 1e-14, "abs": 0.0, "nan_ok": True}
    assert (actual.grad_norm is None) == (expected.grad_norm is None)
    if actual.grad_norm is not None:
        assert actual.grad_norm == pytest.approx(expected.grad_norm, **close)
    assert actual.coefficient == pytest.approx(expected.coefficient, **close)
    assert actual.skipped == expected.skipped
    if not actual.skipped:
        assert actual.reason == expected.reason


@contextlib.contextmanager
def all_reduces():
    """Counts the all-reduces, and checks that they are of a few doubles."""
    calls = []
    real = dist.all_reduce

    def all_reduce(tensor, *args, **kw):
        assert tensor.dtype == torch.float64
        assert tensor.numel() <= 20
        calls.append(tensor.numel())
        return real(tensor, *args, **kw)

    with mock.patch.object(dist, "all_reduce", all_reduce):
        yield calls


# -- clipping and skipping, by placements ----------------------------------------------------------------------------

ARGUMENTS = {
    "max_norm": {"max_norm": 0.5},
    "inf": {"max_norm": 0.5, "norm_type": math.inf},
    "policy": {"max_norm": "ZClip"},
    "skip_nonfinite": {"skip_nonfinite": True},
    "skip_nonfinite inf": {"skip_nonfinite": True, "norm_type": math.inf},
    "clip_value": {"clip_value": 0.1},
    "all": {"max_norm": 3.0, "clip_value": 0.1, "skip_nonfinite": True, "zero_grad": True},
}


def tail(name):
    arguments = dict(ARGUMENTS[name])
    if arguments.get("max_norm") == "ZClip":
        arguments["max_norm"] = onepass.ZClip(warmup_steps=2, max_norm=50.0)
    return arguments


def placed(layout, arguments, dtype):
    torch.set_default_dtype(dtype)
    _, make, count = LAYOUTS[layout]
    layout = make()
    params = params_of(layout)
    twins = twins_of(params)
    opt = onepass.AdamW(params, lr=0.1, **tail(arguments))
    alone = onepass.AdamW(twins, lr=0.1, **tail(arguments))
    measures = not arguments.startswith("clip_value")
    reports = []
    for step in range(4):
        grads = give_gradients(params, layout, step, scale=100.0 if step == 3 else 1.0)
        if step == 2 and "skip" in str(ARGUMENTS[arguments]):  # one element, in each case of one process or of all
            first = next(i for i, p in enumerate(params) if p.numel())
            grads[first].view(-1)[-1] = math.nan
            params[first].grad = spread(grads[first].clone(), *layout[first][1:])
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = grad
        before = [own(p).clone() for p in params] if step == 2 else []
        with only_kernels(len(params)) if step != 2 else contextlib.nullcontext(), all_reduces() as calls:
            opt.step()
        assert len(calls) == (count if measures else 0)
        alone.step()
        reports.append(opt.last_step)
        assert_same_report(opt.last_step, alone.last_step)
        if opt.last_step.skipped:
            assert step == 2
            torch.testing.assert_close([own(p) for p in params], before, rtol=0, atol=0)
        assert_same(params, twins)
        if ARGUMENTS[arguments].get("zero_grad"):
            assert not any(own(p.grad).count_nonzero() for p in params)
    return [str(report) for report in reports]


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_placements(processes, layout, arguments):
    first, *others = processes(LAYOUTS[layout][0], placed, layout, arguments, torch.float64)
    assert all(reports == first for reports in others)
    if "skip" in str(ARGUMENTS[arguments]):
        assert "skipped=True" in first[2]
    if arguments != "clip_value":
        assert "coefficient=1.0" not in first[3] or arguments.startswith("skip")


def of_classes(name, layout):
    """Also those whose DTensors torch's implementation steps."""
    row = ROW[name]
    layout = LAYOUTS[layout][1]()
    if row.takes_matrices:  # torch's cannot step a row over several processes
        layout = [each for each in layout if min(each[0]) > 1]
    params = params_of(layout)
    twins = twins_of(params)
    opt = row.ours(params, **row.full, max_norm=0.5, clip_value=0.05)
    alone = row.ours(twins, **row.full, max_norm=0.5, clip_value=0.05)
    reports = []
    for step in range(3):
        for twin, grad in zip(twins, give_gradients(params, layout, step), strict=True):
            twin.grad = grad
        opt.step()
        alone.step()
        reports.append(str(opt.last_step))
        assert_same_report(opt.last_step, alone.last_step)
        # Muon's iterations are in bfloat16.
        assert_same(params, twins, **({"rtol": 2e-2, "atol": 2e-2} if row.takes_matrices else CLOSE))
    return reports


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Lion", "Muon", "NorMuon"])
def test_classes(processes, name):
    first, second = processes(2, of_classes, name, "Shard(0) of 2")
    assert first == second


def beside_torchs(largest):
    """As torch's function, which cannot do several meshes, plain tensors beside DTensors, and maxima of empty parts."""
    norms = []
    for layout in ("Shard(0)", "hybrid", "2-D"):
        layout = LAYOUTS[layout][1]()
        if largest:
            layout = [((8, 8), *place) for _, *place in layout]
        params = params_of(layout)
        opt = onepass.SGD(params, lr=0.1, max_norm=0.5, norm_type=math.inf if largest else 2.0)
        theirs = params_of(layout)
        for each in (params, theirs):
            give_gradients(each, layout, 1)
        opt.step()
        norm = nn.utils.clip_grad_norm_(theirs, 0.5, math.inf if largest else 2.0).full_tensor()
        torch.optim.SGD(theirs, lr=0.1).step()
        assert opt.last_step.grad_norm == pytest.approx(float(norm), rel=1e-13)
        assert_same(params, [whole(p) for p in theirs])
        norms.append(opt.last_step.grad_norm)
    return norms


@pytest.mark.parametrize("largest", [False, True])
def test_beside_torchs(processes, largest):
    first, *others = processes(4, beside_torchs, largest)
    assert all(norms == first for norms in others)


def complex_numbers():
    layout = [((3, 5), line(), [Shard(0)]), ((3,), None, None)]
    reports = []
    for norm_type in (2.0, math.inf):
        params = params_of(layout, torch.complex128)
        opt = onepass.SGD(params, lr=0.1, max_norm=0.5, norm_type=norm_type)
        grads = torch.cat([grad.flatten() for grad in give_gradients(params, layout, 1)])
        opt.step()
        norm = torch.linalg.vector_norm(grads, norm_type)
        assert opt.last_step.grad_norm == pytest.approx(float(norm), rel=1e-14)
        reports.append(str(opt.last_step))
    return reports


def test_complex(processes):
    first, *others = processes(4, complex_numbers)
    assert all(reports == first for reports in others)


# -- what differs between the processes ------------------------------------------------------------------------------


def bad_on_one_process(where, largest, bad):
    """All processes skip, although the gradient is replicated, and should be the same on all of them."""
    layout = [((4, 3), None, None), ((4, 3), line(), [Replicate()]), ((8, 2), line(), [Shard(0)])]
    params = params_of(layout)
    policy = onepass.ZClip(warmup_steps=2)
    norm_type = math.inf if largest else 2.0
    opt = onepass.AdamW(params, lr=0.1, max_norm=policy, norm_type=norm_type, skip_nonfinite=True)
    reports = []
    for step in range(2):
        give_gradients(params, layout, step)
        opt.step()
        reports.append(opt.last_step)
    before = [own(p).clone() for p in params], [state["step"] for state in opt.state.values()], policy.state_dict()
    give_gradients(params, layout, 2)
    if dist.get_rank() == 3:
        own(params[where].grad).view(-1)[0] = bad
    opt.step()
    after = [own(p).clone() for p in params], [state["step"] for state in opt.state.values()], policy.state_dict()
    assert after[1:] == before[1:]
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    return [*map(str, reports), opt.last_step.skipped, opt.last_step.coefficient]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["plain", "replicated", "shard"])
def test_bad_number_on_one_process(processes, where, largest, bad):
    first, *others = processes(4, bad_on_one_process, where, largest, bad)
    assert all(found == first for found in others)
    assert first[2]


def replicated_differently():
    """What should be the same may differ by roundings: all processes have the first one's norm."""
    layout = [((4, 3), None, None), ((4, 3), line(), [Replicate()]), ((8, 2), line(), [Shard(0)])]
    params = params_of(layout)
    opt = onepass.SGD(params, lr=0.1, max_norm=0.5)
    expected = torch.cat([grad.flatten() for grad in give_gradients(params, layout, 0)]).norm()
    for p in params[:2]:
        own(p.grad).mul_(1 + 1e-9 * dist.get_rank())
    opt.step()
    assert opt.last_step.grad_norm == pytest.approx(float(expected), rel=1e-14)
    return opt.last_step


def test_replicated_gradients_that_differ(processes):
    first, *others = processes(4, replicated_differently)
    assert all(report == first for report in others)


def without_gradients(which, largest, name):
    """Rank 1 has no gradient of some parameters: its parts of them do not count, and it steps none of them."""
    layout = [*of(line(), [Shard(0)]), ((4, 3), None, None)]
    params = params_of(layout)
    twins = twins_of(params)
    cls = getattr(onepass, name)
    options = {"max_norm": 0.5, "norm_type": math.inf if largest else 2.0}
    opt, alone = cls(params, lr=0.1, **options), cls(twins, lr=0.1, **options)
    reports = []
    for step in range(3):
        give_gradients(params, layout, step)
        lost = params[:-1] if which == "all" else params if which == "all and plain" else params[::2]
        for p, twin in zip(params, twins, strict=True):
            if isinstance(p.data, DTensor) and any(p is q for q in lost) and step != 1:
                part = own(p.grad) * (dist.get_rank() != 1)
                twin.grad = whole(
                    DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
                )
            else:
                twin.grad = whole(p.grad)
        if dist.get_rank() == 1 and step != 1:
            for p in lost:
                p.grad = None
        opt.step()
        alone.step()
        assert_same_report(opt.last_step, alone.last_step)
        assert_same(params[:-1], twins[:-1])
        reports.append(opt.last_step)
    return reports


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("which", ["some", "all", "all and plain"])
def test_no_gradients_on_one_process(processes, which, largest):
    first, *others = processes(2, without_gradients, which, largest, "SGD")
    assert all(reports == first for reports in others)


def fallback_without_gradients():
    """Rank 1 has a gradient that torch's implementation steps, and none of a DTensor."""
    layout = [((8, 2), line(), [Shard(0)]), ((4, 3), None, None)]
    params = params_of(layout)
    opt = onepass.SGD(params, lr=0.1, max_norm=0.5)
    opt.add_param_group({"params": [Parameter(torch.ones(3))], "differentiable": True})
    [extra] = opt.param_groups[1]["params"]
    extra.grad = torch.ones(3)
    give_gradients(params, layout, 0)
    grads = [own(params[0].grad) * (dist.get_rank() == 0), params[1].grad, extra.grad]
    expected = math.sqrt(sum(float(g.square().sum()) for g in grads[1:]))
    squares = grads[0].square().sum()
    dist.all_reduce(squares)
    if dist.get_rank() == 1:
        params[0].grad = None
    with torch.no_grad():
        opt.step()
    assert opt.last_step.grad_norm == pytest.approx(math.hypot(expected, math.sqrt(float(squares))), rel=1e-14)
    torch.testing.assert_close(extra.detach(), 1 - 0.1 * opt.last_step.coefficient * torch.ones(3))
    return opt.last_step


def test_no_gradients_on_one_process_and_a_fallback(processes):
    first, second = processes(2, fallback_without_gradients)
    assert first == second


def partial(place, arguments):
    mesh = line()
    torch.manual_seed(0)
    p = Parameter(distribute_tensor(torch.randn(3, 5), mesh, [place]))
    twin = Parameter(whole(p))
    opt, alone = (onepass.AdamW([each], lr=0.1, **tail(arguments)) for each in (p, twin))
    for step in range(4):
        p.grad = DTensor.from_local(torch.randn(3, 5) * (1 + dist.get_rank() + 50 * (step == 3)), mesh, [Partial()])
        if step == 2 and "skip" in str(ARGUMENTS[arguments]) and dist.get_rank() == 1:
            own(p.grad)[0, 0] = math.nan
        twin.grad = whole(p.grad)
        opt.step()
        alone.step()
        assert_same_report(opt.last_step, alone.last_step)
        assert_same([p], [twin])
        if "zero_grad" in ARGUMENTS[arguments]:
            assert not own(p.grad).count_nonzero()
        assert p.grad.placements == (Partial(),)
    return str(opt.last_step)


@pytest.mark.parametrize("arguments", ["max_norm", "inf", "policy", "clip_value", "all"])
@pytest.mark.parametrize("place", [Shard(0), Replicate()], ids=str)
def test_partial_gradients(processes, place, arguments):
    first, second = processes(2, partial, place, arguments)
    assert first == second


def two_meshes_by_name():
    """Meshes whose names have another hash on each process: communication is in the order of the parameters."""
    meshes = [init_device_mesh("cpu", (2,), mesh_dim_names=(name,)) for name in "abcdefgh"]
    layout = [((4,), mesh, [Shard(0)]) for mesh in meshes]
    params = params_of(layout)
    opt = onepass.SGD(params, lr=0.1, max_norm=0.5)
    expected = torch.cat(give_gradients(params, layout, 0)).norm()
    with all_reduces() as calls:
        opt.step()
    assert opt.last_step.grad_norm == pytest.approx(float(expected), rel=1e-14)
    return len(calls), opt.last_step


def test_the_order_of_meshes(processes):
    first, second = processes(2, two_meshes_by_name)
    assert first == second
    assert first[0] == 8


def outside_a_mesh():
    """Ranks 2 and 3 have no part of the mesh: they do not communicate, and do not count its gradients."""
    mesh = DeviceMesh("cpu", [0, 1])
    layout = [((4, 3), mesh, [Shard(0)]), ((4, 3), None, None)]
    params = params_of(layout)
    opt = onepass.SGD(params, lr=0.1, max_norm=0.5)
    give_gradients(params, layout, 0)
    expected = params[1].grad.square().sum()
    if dist.get_rank() < 2:
        expected += whole(params[0].grad).square().sum()
    opt.step()
    assert opt.last_step.grad_norm == pytest.approx(math.sqrt(float(expected)), rel=1e-14)


def test_processes_outside_a_mesh(processes):
    processes(4, outside_a_mesh)


# -- models ----------------------------------------------------------------------------------------------------------


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2, bias=False))


def shard(model, **kw):
    for part in (model[0], model[2], model):
        fully_shard(part, **kw)
    return model


class Block(nn.Module):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def fsdp():
    return shard(net())


def hybrid_fsdp():
    return shard(net(), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))


def tensor_parallel():
    return parallelize_module(Block(), line(), PLAN)


def fsdp_and_tensor_parallel():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return fully_shard(parallelize_module(Block(), mesh["tensor"], PLAN), mesh=mesh["data"])


def ddp():
    return DistributedDataParallel(net())


def backward(model, step, apart=1.0):
    for p in model.parameters():
        p.grad = None
    width = 4 if any("norm" in name for name, _ in model.named_modules()) else 3
    x = torch.linspace(-1, 1, 4 * width).view(4, width) + 0.07 * step + 0.1 * apart * dist.get_rank()
    (model(x) ** 2).sum().backward()


MODELS = {
    "fsdp of 2": (2, fsdp),
    "fsdp": (4, fsdp),
    "hybrid fsdp": (4, hybrid_fsdp),
    "tensor parallel": (4, tensor_parallel),
    "fsdp and tensor parallel": (4, fsdp_and_tensor_parallel),
    "ddp": (4, ddp),
}


def trained(name, arguments):
    model = MODELS[name][1]()
    twins = twins_of(model.parameters())
    opt = onepass.AdamW(model.parameters(), lr=0.05, **tail(arguments))
    alone = onepass.AdamW(twins, lr=0.05, **tail(arguments))
    reports = []
    for step in range(4):
        backward(model, step, apart="tensor" not in name)
        for p, twin in zip(model.parameters(), twins, strict=True):
            twin.grad = whole(p.grad)
        opt.step()
        alone.step()
        reports.append(str(opt.last_step))
        assert_same_report(opt.last_step, alone.last_step)
        assert_same(model.parameters(), twins)
    return reports


@pytest.mark.parametrize("arguments", ["max_norm", "inf", "policy", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_models(processes, name, arguments):
    first, *others = processes(MODELS[name][0], trained, name, arguments)
    assert all(reports == first for reports in others)


def clipped_by_torch(name):
    ends = []
    for inside in (True, False):
        model = MODELS[name][1]()
        opt = onepass.AdamW(model.parameters(), lr=0.05, **({"max_norm": 0.5} if inside else {}))
        for step in range(4):
            backward(model, step)
            if not inside:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
        ends.append([whole(p) for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["fsdp", "hybrid fsdp", "ddp"])
def test_models_as_torchs_function(processes, name):
    processes(4, clipped_by_torch, name)


def scaled():
    """GradScaler: the norm is of the unscaled gradients, and a step that it skips is skipped on all processes."""
    model = fsdp()
    twins = twins_of(model.parameters())
    opt = onepass.AdamW(model.parameters(), lr=0.05, max_norm=0.5)
    alone = onepass.AdamW(twins, lr=0.05, max_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    reports = []
    for step in range(3):
        backward(model, step)
        if step != 1:
            for p, twin in zip(model.parameters(), twins, strict=True):
                twin.grad = whole(p.grad)
            alone.step()
        for p in model.parameters():
            own(p.grad).mul_(8.0)
        if step == 1 and dist.get_rank() == 1:
            own(next(model.parameters()).grad).view(-1)[0] = math.inf
        scaler.scale(torch.ones(()))
        scaler.step(opt)
        scaler.update(8.0)
        reports.append(opt.last_step)
        assert opt.last_step.skipped == (step == 1)
        if step != 1:
            assert_same_report(opt.last_step, alone.last_step)
        assert_same(model.parameters(), twins)
    return reports


def test_grad_scaler(processes):
    first, second = processes(2, scaled)
    assert first == second


def lookahead():
    model = fsdp()
    twins = twins_of(model.parameters())
    opts = [
        onepass.Lookahead(onepass.AdamW(params, lr=0.05, max_norm=0.5), k=2) for params in (model.parameters(), twins)
    ]
    for step in range(4):
        backward(model, step)
        for p, twin in zip(model.parameters(), twins, strict=True):
            twin.grad = whole(p.grad)
        for opt in opts:
            opt.step()
        assert_same_report(opts[0].optimizer.last_step, opts[1].optimizer.last_step)
        assert_same(model.parameters(), twins)


def test_lookahead(processes):
    processes(4, lookahead)


# -- averages and copies ---------------------------------------------------------------------------------------------


def listed(params):
    return nn.ParameterList(params)


def averaged(layout, decay):
    layout = LAYOUTS[layout][1]()
    model = listed(params_of(layout))
    twins = listed(twins_of(model))
    averages = [AveragedModel(each, decay=decay) for each in (model, twins)]
    copies = [[p.detach().float() for p in each] for each in (model, twins)]
    opt, alone = (
        onepass.AdamW(each.parameters(), lr=0.1, average=average, copy_to=copied, max_norm=1.0, skip_nonfinite=True)
        for each, average, copied in zip((model, twins), averages, copies, strict=True)
    )
    for step in range(4):
        give_gradients(list(model), layout, step, scale=math.nan if step == 2 else 1.0)
        for p, twin in zip(model, twins, strict=True):
            twin.grad = whole(p.grad)
        if step == 3:  # the kernels do not step the first
            for each in (model, twins):
                each[0].grad = None
        opt.step()
        alone.step()
        assert opt.last_step.skipped == (step == 2)
        assert_same(model, twins)
        assert_same(averages[0].module.parameters(), averages[1].module.parameters())
        assert_same(copies[0], copies[1], rtol=0, atol=0)
        for each, average in zip((model, twins), averages, strict=True):
            average.update_parameters(each)
        assert [int(average.n_averaged) for average in averages] == [(1, 2, 2, 3)[step]] * 2
    before = [own(p).clone() for p in model]
    with averages[0].swapped(model):
        assert_same(model, averages[1].module.parameters())
    torch.testing.assert_close([own(p) for p in model], before, rtol=0, atol=0)


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("layout", ["Shard(0)", "plain beside all", "2-D", "two meshes"])
def test_averages_and_copies(processes, layout, decay):
    processes(LAYOUTS[layout][0], averaged, layout, decay)


def placed_otherwise():
    """Followers of other placements are updated in torch's operations."""
    p = Parameter(distribute_tensor(torch.ones(3, 2), line(), [Shard(0)]))
    model = listed([p])
    average = AveragedModel(model, decay=0.5)
    average.module[0] = Parameter(distribute_tensor(torch.ones(3, 2), line(), [Replicate()]))
    average.update_parameters(model)
    copied = distribute_tensor(torch.zeros(3, 2), line(), [Shard(1)])
    opt = onepass.SGD([p], lr=1.0, average=average, copy_to=[copied])
    for step in range(2):
        p.grad = distribute_tensor(torch.ones(3, 2), line(), [Shard(0)])
        opt.step()
        assert_same([p, copied], [torch.full((3, 2), -1.0 * step)] * 2)
        assert average.module[0].placements == (Replicate(),)
        assert_same([average.module[0]], [torch.full((3, 2), (0.5, -0.25)[step])])


def test_followers_placed_otherwise(processes):
    processes(2, placed_otherwise)


class Rooted(nn.Module):
    """With parameters of its own, which the root of fully_shard keeps gathered after a forward pass."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.inner = nn.Linear(3, 5, bias=False)  # before a normalization, the gradient of a bias is zero
        self.outer = nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x):
        return self.outer(torch.tanh(self.norm(self.inner(x))))


def averaged_fsdp(in_step):
    """The average is made first, then both are sharded. An evaluation leaves nothing behind."""
    x = torch.linspace(-1, 1, 12).view(4, 3)
    ends = []
    for sharded in (True, False):
        model = Rooted()
        average = AveragedModel(model, decay=0.9)
        if sharded:
            for each in (model, average.module):
                fully_shard(each.inner)
                fully_shard(each)
        arguments = {"average": average} if in_step else {}
        opt = onepass.AdamW(model.parameters(), lr=0.05, max_norm=0.5, zero_grad=True, **arguments)
        losses = []
        for step in range(4):
            (model(x + step) ** 2).sum().backward()
            opt.step()
            assert opt.last_step.coefficient < 1.0
            assert not any(own(p.grad).count_nonzero() for p in model.parameters())
            with torch.no_grad():
                losses += [float(model(x).sum()), float(average(x).sum())]
            average.update_parameters(model)
            model.eval()
            with torch.no_grad():
                losses.append(float(model(x).sum()))
                with average.swapped(model):
                    losses.append(float(model(x).sum()))
                losses.append(float(model(x).sum()))
            model.train()
            assert losses[-1] == losses[-3]
            assert (losses[-2] != losses[-1]) == (step > 0)
        ends.append(([whole(t) for t in [*model.parameters(), *average.module.parameters()]], losses))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("in_step", [True, False])
def test_average_of_fsdp(processes, in_step):
    processes(2, averaged_fsdp, in_step)


def refused_followers():
    told = []

    def note(function):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the caller compares the messages
            function()
        told.append(str(error.value))

    note(lambda: AveragedModel(fsdp(), decay=0.9))
    p = Parameter(distribute_tensor(torch.ones(4, 2), line(), [Shard(0)]))
    note(lambda: onepass.SGD([p], lr=0.1, copy_to=[torch.ones(4, 2)]))
    note(lambda: onepass.SGD([Parameter(torch.ones(4, 2))], lr=0.1, copy_to=[p.detach()]))
    other = distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (2, 1)), [Shard(0), Replicate()])
    note(lambda: onepass.SGD([p], lr=0.1, copy_to=[other]))
    model = net()
    average = AveragedModel(model, decay=0.9)
    shard(model)
    note(lambda: onepass.SGD(model.parameters(), lr=0.1, average=average))
    return told


def test_refused_followers(processes):
    told, same = processes(2, refused_followers)
    assert told == same
    mesh = "DeviceMesh((2,), 'cpu', stride=(1,))"
    assert told[0].startswith("AveragedModel: a model of fully_shard cannot be copied: make the average first")
    assert told[1] == f"SGD: copy_to[0] must be a DTensor over its parameter's {mesh}, got a plain tensor"
    assert told[2] == f"SGD: copy_to[0] must be a plain tensor, as its parameter is, got a DTensor over {mesh}"
    assert told[3].startswith(
        f"SGD: copy_to[0] must be a DTensor over its parameter's {mesh}, got a DTensor over Device"
    )
    assert told[4] == f"SGD: average of parameter 0 must be a DTensor over its parameter's {mesh}, got a plain tensor"


# -- zeroed gradients ------------------------------------------------------------------------------------------------


def zeroed(make):
    """As ``zero_grad(set_to_none=False)`` after the step: the gradients of the next step are added in place."""
    ends = []
    for inside in (True, False):
        model = make()
        opt = onepass.AdamW(model.parameters(), lr=0.05, zero_grad=inside)
        addresses = []
        for step in range(4):
            x = torch.linspace(-1, 1, 12).view(4, 3) + 0.07 * step + 0.1 * dist.get_rank()
            (model(x) ** 2).sum().backward()
            addresses.append([own(p.grad).data_ptr() for p in model.parameters()])
            opt.step()
            if not inside:
                opt.zero_grad(set_to_none=False)
            assert not any(own(p.grad).count_nonzero() for p in model.parameters())
        # The first backward pass of DDP tells the order of the buckets, which are made again.
        assert addresses[3] == addresses[2] or make is not ddp_with_views
        ends.append([whole(p) for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def ddp_with_views():
    return DistributedDataParallel(net(), gradient_as_bucket_view=True, static_graph=True)


@pytest.mark.parametrize("make", [ddp_with_views, ddp, fsdp], ids=lambda make: make.__name__)
def test_zero_grad(processes, make):
    processes(2, zeroed, make)


# -- wrappers of torch.distributed -----------------------------------------------------------------------------------


def wrapped_part(arguments):
    """These give an optimizer only some of the parameters, so that the norm would be that of the part."""
    model = net()
    if arguments == "average":
        options = {"average": AveragedModel(model)}
    else:
        options = {arguments: 1.0 if arguments == "max_norm" else True}
    told = []
    for make in (
        lambda: ZeroRedundancyOptimizer(model.parameters(), onepass.AdamW, lr=0.1, **options),
        lambda: _apply_optimizer_in_backward(onepass.AdamW, model.parameters(), {"lr": 0.1, **options}),
    ):
        with pytest.raises(ValueError, match="leave out") as error:
            make()
        told.append(str(error.value))
    ZeroRedundancyOptimizer(model.parameters(), onepass.AdamW, lr=0.1, clip_value=0.1)
    return told


@pytest.mark.parametrize("argument", ["max_norm", "skip_nonfinite", "zero_grad", "average"])
def test_wrappers_that_divide_the_parameters(processes, argument):
    for told in processes(2, wrapped_part, argument):
        assert told == [
            f"AdamW: {argument} needs all gradients of a step, but {name} gives each optimizer only some of the "
            f"parameters: leave out {argument}. clip_grad_norm_ before the step clips all gradients"
            for name in ("ZeroRedundancyOptimizer", "_apply_optimizer_in_backward")
        ]


def zero_with_clip_value():
    ends = []
    for inside in (True, False):
        model = DistributedDataParallel(net())
        options = {"clip_value": 0.05} if inside else {}
        opt = ZeroRedundancyOptimizer(model.parameters(), onepass.AdamW, lr=0.1, **options)
        for step in range(3):
            backward(model, step)
            if not inside:
                nn.utils.clip_grad_value_(model.parameters(), 0.05)
            opt.step()
        ends.append([whole(p) for p in model.parameters()])
    torch.testing.assert_close(*ends, **CLOSE)


def test_zero_with_clip_value(processes):
    processes(2, zero_with_clip_value)


def local_sgd():
    """The gradients are each process's own, and so are the norms."""
    ends, norms = [], []
    for inside in (True, False):
        model = net()
        options = {"max_norm": 0.5} if inside else {}
        averager = PeriodicModelAverager(period=2, warmup_steps=1)
        opt = PostLocalSGDOptimizer(onepass.AdamW(model.parameters(), lr=0.05, **options), averager)
        for step in range(4):
            backward(model, step)
            if inside:
                opt.step()
                norms.append(opt.optim.last_step.grad_norm)
                continue
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
            assert norms[step] == pytest.approx(norm, rel=1e-12)
            opt.step()
        ends.append([whole(p) for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-11)
    return norms


def test_local_sgd(processes):
    first, second = processes(2, local_sgd)
    assert first != second
