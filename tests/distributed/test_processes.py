"""Real processes around our optimizers: what torch.distributed makes of parameters, gradients and states, and back.

A test calls a function above it in 2 or 4 processes, over gloo; each holds its own part of the tensors. The judge is
torch.optim: over whole tensors, in each process alike (`Alone`), and over the same parts where it can do those.
"""

import contextlib
import copy
import warnings

import imitation
import onepass
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import ALONE, ELEMENTWISE, ROW, ROWS, SCALARS
from contract import CLOSE
from onepass.swa_utils import AveragedModel
from placements import own, own_of_both, spread, whole
from reference import bits, only_kernels, params_of
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import Linear, Parameter, Sequential, Tanh

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch's own parts
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import (
        PostLocalSGDOptimizer,
        ZeroRedundancyOptimizer,
        _apply_optimizer_in_backward,
    )

NAMES = [row.name for row in ALONE]
TORCHS = [row.name for row in ELEMENTWISE if issubclass(row.ours, row.theirs)]
SHARDED = [name for name in TORCHS if name != "Rprop"]  # what torch can do over DTensors


# -- what the functions that run in the processes share --------------------------------------------------------------


def net():
    """Of vectors and matrices that do not divide: the bias of 3 is in 2 + 1 parts or 1 + 1 + 1 + 0."""
    torch.manual_seed(0)
    return Sequential(Linear(3, 5), Tanh(), Linear(5, 3), Tanh(), Linear(3, 2, bias=False))


TENSORS = 5  # of that net


def shard(model, **kw):
    for part in (model[0], model[2], model):
        fully_shard(part, **kw)
    return model


def add_gradients(model, step, apart=1.0, width=3):
    """Those of the step of that number, on data that are each process's own unless `apart` is zero."""
    x = torch.linspace(-1, 1, 4 * width).view(4, width) + 0.07 * step + 0.1 * apart * dist.get_rank()
    (model(x) ** 2).sum().backward()


def backward(model, step, apart=1.0, width=3):
    model.zero_grad()
    add_gradients(model, step, apart, width)


def contents(opt):
    """Parameters and states, whole."""
    params = params_of(opt)
    states = [{name: whole(x) for name, x in opt.state[p].items() if isinstance(x, torch.Tensor)} for p in params]
    return [whole(p) for p in params], states


def everything(opt):
    """Parameters and states, each by the number of its parameter and its name."""
    found = {}
    for i, p in enumerate(params_of(opt)):
        found[i, "param"] = p
        found |= {(i, name): x for name, x in opt.state[p].items() if isinstance(x, torch.Tensor)}
    return found


def assert_equal(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **(tolerance or CLOSE))


def assert_kernels(opt):
    assert {row.path for row in onepass.explain(opt)} == {"kernel"}, str(onepass.explain(opt))


def assert_placed(opt, numbers=frozenset(SCALARS)):
    """States are spread as torch's are."""
    for p in params_of(opt):
        for name, state in opt.state[p].items():
            if name in numbers or not isinstance(p, DTensor):
                assert type(state) is torch.Tensor, name
                assert state.device.type == "cpu"
            else:
                assert type(state) is DTensor, name
                assert state.placements == p.placements
                assert state.device_mesh == p.device_mesh
                assert state._local_tensor.shape == p._local_tensor.shape


class Alone:
    """An optimizer over whole tensors, which is given what the gradients of a spread one are together."""

    def __init__(self, make, opt):
        self._opt = opt
        self.params = [Parameter(whole(p)) for p in params_of(opt)]
        self.opt = make(self.params)

    def step(self):
        for p, q in zip(self.params, params_of(self._opt), strict=True):
            p.grad = None if q.grad is None else whole(q.grad)
        self.opt.step()

    def compare(self, **tolerance):
        actual, expected = everything(self._opt), everything(self.opt)
        assert actual.keys() == expected.keys()
        pairs = {key: own_of_both(actual[key], expected[key]) for key in actual}
        assert_equal(*({key: pair[i] for key, pair in pairs.items()} for i in (0, 1)), **tolerance)


def both(make_ours, make_theirs, model, steps=3, width=3, tensors=TENSORS, **tolerance):
    """Steps ours over a model, by kernels alone, beside another over whole tensors; returns ours."""
    ours = make_ours(model.parameters())
    alone = Alone(make_theirs, ours)
    for step in range(steps):
        backward(model, step, width=width)
        with only_kernels(tensors):
            ours.step()
        alone.step()
        alone.compare(**tolerance)
    assert_kernels(ours)
    assert_placed(ours)
    return ours


def classes(name, **more):
    row = ROW[name]
    options = {**row.full, **more}
    return (lambda params: row.ours(params, **options)), (lambda params: row.theirs(params, **options))


# -- FSDP2 -----------------------------------------------------------------------------------------------------------


def fsdp2(name):
    both(*classes(name), shard(net()), steps=4)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_fsdp2(processes, name, world):
    processes(world, fsdp2, name)


def fsdp2_beside_torchs(name):
    ends = []
    for make in classes(name):
        model = shard(net())
        opt = make(model.parameters())
        for step in range(3):
            backward(model, step)
            opt.step()
        kinds = [
            {k: (type(s), getattr(s, "placements", None), s.dtype) for k, s in opt.state[p].items()}
            for p in params_of(opt)
        ]
        ends.append((contents(opt), kinds))
    (ours, our_kinds), (theirs, their_kinds) = ends
    assert_equal(ours, theirs)
    assert our_kinds == their_kinds
    return [p._local_tensor.numel() for p in params_of(opt)]


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp2_beside_torchs(processes, name):
    held = processes(4, fsdp2_beside_torchs, name)
    assert held[0] == [6, 2, 5, 1, 3]
    assert held[3] == [0, 0, 0, 0, 0]


def late_gradients():
    model = shard(net())
    ours, theirs = classes("AdamW")
    opt = ours(model.parameters())
    alone = Alone(theirs, opt)
    for step, stepped in enumerate((3, 5, 4)):
        backward(model, step)
        for p in params_of(opt)[stepped:]:
            p.grad = None
        with only_kernels(stepped):
            opt.step()
        alone.step()
        alone.compare()


def test_gradients_that_come_late(processes):
    processes(2, late_gradients)


def norms_of_whole_tensors(name):
    sharded, whole = shard(net()), net()
    ours = classes(name)[0](sharded.parameters())
    alone = classes(name)[0](whole.parameters())
    for step in range(4):
        backward(sharded, step)
        for p, q in zip(params_of(alone), params_of(ours), strict=True):
            p.grad = q.grad.full_tensor()
        with only_kernels():
            ours.step()
        alone.step()
        for p, q in zip(params_of(alone), params_of(ours), strict=True):
            torch.testing.assert_close(q.full_tensor(), p.detach(), rtol=1e-5, atol=1e-6)
            for key, value in alone.state[p].items():
                held = ours.state[q][key]
                torch.testing.assert_close(held.full_tensor() if isinstance(held, DTensor) else held, value)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", [row.name for row in ELEMENTWISE if row.sums])
def test_norms_are_those_of_whole_tensors(processes, name, world):
    """A process has only a part of each tensor."""
    processes(world, norms_of_whole_tensors, name)


SUMMED = [(row.name, {}) for row in ELEMENTWISE if row.sums]
SUMMED += [(name, {"cautious": True}) for name in ("AdamW", "Lion", "SGD")]
SUMMED_IN_8_BITS = [(name, {"cautious": True}) for name in ("AdamW", "Lion")]


def sums_over_shards(library, name, more, dtype, dims):
    """Every process has all gradients, so the whole tensors are stepped in each, too."""
    shapes = [(96, 70), (33, 96), (5,), (1, 3), (0, 7)]
    mesh = init_device_mesh("cpu", (dist.get_world_size() // dims, dims) if dims > 1 else (dist.get_world_size(),))
    placed = [
        (Shard(0),) * mesh.ndim if i % 2 == 0 else (*(Replicate(),) * (mesh.ndim - 1), Shard(0))
        for i in range(len(shapes))
    ]
    torch.manual_seed(1)
    values = [torch.randn(shape, dtype=dtype) for shape in shapes]
    wholes = [Parameter(x) for x in values]
    shards = [Parameter(spread(x.clone(), mesh, at)) for x, at in zip(values, placed, strict=True)]
    options = ROW[name].full | more
    ours, alone = (ROW[name].ours(params, **options) for params in (shards, wholes))
    for _ in range(4):
        for p, q, at in zip(wholes, shards, placed, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = spread(p.grad.clone(), mesh, at)
        alone.step()
        with contextlib.ExitStack() as stack:
            if library is not None:
                counts_there = ours._counts_on_device(ours.param_groups[0])
                stack.enter_context(imitation.gpu(imitation.loaded(library), numbers_too=counts_there))
            stack.enter_context(only_kernels(len(shapes)))
            ours.step()
        for p, q in zip(wholes, shards, strict=True):
            tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 1e-7}
            torch.testing.assert_close(own(q), own(spread(p.detach(), mesh, q.placements)), **tolerance)
            for key, value in alone.state[p].items():
                actual, expected = own_of_both(ours.state[q][key], value)
                torch.testing.assert_close(actual.double(), expected.double(), **tolerance)


@pytest.mark.parametrize(
    ("name", "more", "dtype"),
    [
        *((*case, dtype) for case in SUMMED for dtype in (torch.float32, torch.float64)),
        *((name, {**more, "state_dtype": torch.float8_e4m3fn}, torch.float32) for name, more in SUMMED_IN_8_BITS),
    ],
)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_sums_over_shards(processes, request, on_gpu, name, more, dtype):
    """On meshes of one and of two dimensions, on the CPU and on an imitated GPU."""
    library = request.getfixturevalue("imitated")._name if on_gpu else None
    world, dims = (2, 1) if dtype == torch.float64 else (4, 2)
    processes(world, sums_over_shards, library, name, more, dtype, dims)


def fewer_rows_than_processes(name, shapes, rtol, atol):
    for shape in shapes:
        torch.manual_seed(len(shape))
        whole = torch.nn.Parameter(torch.randn(shape))
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        sharded = torch.nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
        ours, alone = (getattr(onepass, name)([p], lr=1e-3) for p in (sharded, whole))
        for step in range(3):
            torch.manual_seed(step)
            whole.grad = torch.randn(shape)
            sharded.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
            ours.step()
            alone.step()
            torch.testing.assert_close(sharded.detach().full_tensor(), whole.detach(), rtol=rtol, atol=atol)
            for key, value in alone.state[whole].items():
                held = ours.state[sharded][key]
                held = held.full_tensor() if isinstance(held, DTensor) else held
                torch.testing.assert_close(held, value, rtol=1e3 * rtol, atol=atol)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("name", "shapes", "rtol", "atol"),
    [
        ("CAME", [(1, 4), (1, 1), (1, 3, 4), (3, 5), (2, 8), (3,)], 1e-6, 1e-7),
        ("NorMuon", [(1, 4), (1, 1), (3, 5), (2, 8)], 1e-4, 1e-5),  # its iterations are in bfloat16
    ],
)
def test_fewer_rows_than_processes(processes, world, name, shapes, rtol, atol):
    """torch's operations then place results otherwise than their operands."""
    processes(world, fewer_rows_than_processes, name, shapes, rtol, atol)


def sam(adaptive):
    sharded, whole = shard(net()), net()
    ours = onepass.SAM(onepass.SGD(sharded.parameters(), lr=0.1), rho=0.5, adaptive=adaptive)
    alone = onepass.SAM(onepass.SGD(whole.parameters(), lr=0.1), rho=0.5, adaptive=adaptive)
    before = [bits(q.to_local()) for q in params_of(ours)]
    backward(sharded, 0)
    for p, q in zip(params_of(alone), params_of(ours), strict=True):
        p.grad = q.grad.full_tensor()
    ours.first_step()
    alone.first_step()
    for p, q in zip(params_of(alone), params_of(ours), strict=True):
        torch.testing.assert_close(q.full_tensor(), p.detach(), rtol=1e-6, atol=1e-7)
    ours.restore()
    assert [bits(q.to_local()) for q in params_of(ours)] == before


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam(processes, adaptive):
    """The norm of the first step is that of the whole tensors."""
    processes(2, sam, adaptive)


def both_points(name):
    """Of Schedule-Free: eval() and train() move the shards as they move whole tensors."""
    sharded, whole = shard(net()), net()
    ours = classes(name)[0](sharded.parameters())
    alone = classes(name)[0](whole.parameters())
    for step in range(3):
        backward(sharded, step)
        ours.step()
        for p, q in zip(params_of(alone), params_of(ours), strict=True):
            p.grad = q.grad.full_tensor()
        alone.step()
    trained = [p.to_local().clone() for p in params_of(ours)]
    for optimizer in (ours, alone):
        optimizer.eval()
    for p, q in zip(params_of(ours), params_of(alone), strict=True):
        assert type(ours.state[p]["y"]) is DTensor
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=0, atol=0)
    ours.train()
    for p, before in zip(params_of(ours), trained, strict=True):
        assert torch.equal(p.to_local(), before)


@pytest.mark.parametrize("name", ["ScheduleFreeAdamW", "ScheduleFreeSGD"])
def test_both_points_of_schedule_free(processes, name):
    processes(2, both_points, name)


def evaluated(name):
    """Evaluations between the steps, as docs/frameworks/fsdp.md describes them, do not change the training."""
    ends = []
    for is_sharded in (True, False):
        model = net()
        if is_sharded:
            shard(model)
        params = list(model.parameters())
        opt = onepass.Lookahead(onepass.SGD(params, lr=0.01), k=2) if name == "Lookahead" else ROW[name].ours(params)
        seen = []

        def evaluate(model=model, seen=seen, is_sharded=is_sharded):
            with torch.no_grad():
                seen.append(model(torch.ones(1, 3)))
            if is_sharded:
                model.reshard()

        for step in range(4):
            train(model, opt, [step])
            evaluate()
            if name == "Lookahead":
                with opt.slow_weights():
                    evaluate()
            else:
                opt.eval()
                evaluate()
                opt.train()
            evaluate()
        ends.append((seen, contents(opt)))
    assert_equal(*ends)


@pytest.mark.parametrize("name", ["ScheduleFreeAdamW", "ScheduleFreeSGD", "Lookahead"])
def test_evaluation_between_the_steps(processes, name):
    processes(2, evaluated, name)


# -- checkpoints -----------------------------------------------------------------------------------------------------

LIBRARIES = {"onepass": onepass, "torch": torch.optim}
WRITERS_AND_READERS = [("onepass", "onepass"), ("onepass", "torch"), ("torch", "onepass")]
GATHERED = ("full", "broadcast")  # into one file, of which each process takes its part, or rank 0 alone for all
FORMS = ("nested", "flat", *GATHERED)


# Those that torch cannot step over DTensors, or not with biases, are of whole tensors; those two that it cannot ask for
# states (by a step with gradients of zeros and no closure) are left out.
SAVED = [row.name for row in ROWS if issubclass(row.ours, row.theirs) and row.name not in ("SparseAdam", "LBFGS")]


def make(library, name, model, **options):
    return getattr(LIBRARIES[library], name)(model.parameters(), **{**ROW[name].full, **options})


def net_for(name, whole=False):
    model = net()
    if ROW[name].takes_matrices:
        model[0].bias = model[2].bias = None
    return model if whole or name not in SHARDED else shard(model)


def train(model, opt, steps):
    for step in steps:
        backward(model, step, apart=0)  # or the number of processes would change the gradients
        opt.step()


def values(opt):
    """All that groups hold but the parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]


def spoil(opt):
    """Changes what a checkpoint is to bring back."""
    for group in opt.param_groups:
        for key, value in values(opt)[0].items():
            if isinstance(value, float):
                group[key] = value / 2
            elif isinstance(value, tuple):
                group[key] = tuple(x and x / 2 for x in value)


def uninterrupted(name):
    model = net_for(name, whole=True)
    opt = make("torch", name, model)
    train(model, opt, range(6))
    return contents(opt), values(opt)


def save(library, name, folder, form, options=None):
    model = net_for(name)
    opt = make(library, name, model, **(options or {}))
    train(model, opt, range(3))
    if form in GATHERED:
        options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
        saved = dcp_state.get_state_dict(model, opt, options=options)
        if dist.get_rank() == 0:
            torch.save(saved, folder / "full.pt")
    else:
        options = dcp_state.StateDictOptions(flatten_optimizer_state_dict=form == "flat")
        states = dcp_state.get_state_dict(model, opt, options=options)
        dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder)
    return contents(opt)


def reader_of(library, name, **options):
    """A model and its optimizer with other numbers than those that are saved."""
    model = net_for(name)
    with torch.no_grad():
        for p in model.parameters():
            (p._local_tensor if isinstance(p, DTensor) else p).add_(1)
    opt = make(library, name, model, **options)
    spoil(opt)
    return model, opt


def read(model, opt, folder, form, planner=None):
    if form in GATHERED:
        broadcast = form == "broadcast"
        options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        states = {}, {}
        if not broadcast or dist.get_rank() == 0:
            states = torch.load(folder / "full.pt", weights_only=True)
    else:
        options = dcp_state.StateDictOptions(flatten_optimizer_state_dict=form == "flat")
        states = dcp_state.get_state_dict(model, opt, options=options)
        held = dict(zip(("model", "optimizer"), states, strict=True))
        dcp.load(held, checkpoint_id=folder, planner=planner)
        states = held["model"], held["optimizer"]
    # Not set_state_dict: a process that has no model_state_dict loads the optimizer alone there, and rank 0, which has
    # one to broadcast, waits for it for ever.
    dcp_state.set_model_state_dict(model, states[0], options=options)
    dcp_state.set_optimizer_state_dict(model, opt, states[1], options=options)


def load(library, name, folder, form):
    model, opt = reader_of(library, name)
    read(model, opt, folder, form)
    sharded = library == "onepass" and name in SHARDED
    if sharded:
        assert_placed(opt)
    with only_kernels(3 * TENSORS) if sharded else contextlib.nullcontext():
        train(model, opt, range(3, 6))
    return contents(opt), values(opt)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world", [4, 1])
@pytest.mark.parametrize(("writer", "reader"), WRITERS_AND_READERS)
def test_checkpoint_of_2_processes(processes, tmp_path, writer, reader, world, form):
    processes(2, save, writer, "AdamW", tmp_path, form)
    [expected] = processes(1, uninterrupted, "AdamW")
    for actual in processes(world, load, reader, "AdamW", tmp_path, form):
        assert_equal(actual, expected)


# torch makes the flat form of the nested one. The classes differ in what their states are, so not all are needed twice.
FLAT = ("AdamW", "Adafactor", "CAME", "Muon", "NAdam", "SGD")


@pytest.mark.parametrize(
    ("name", "form"), [(name, "nested") for name in SAVED] + [(name, "flat") for name in SAVED if name in FLAT]
)
@pytest.mark.parametrize(("writer", "reader"), WRITERS_AND_READERS)
def test_checkpoint_of_each_class(processes, tmp_path, name, writer, reader, form):
    processes(2, save, writer, name, tmp_path, form)
    [expected] = processes(1, uninterrupted, name)
    for actual in processes(4, load, reader, name, tmp_path, form):
        assert_equal(actual, expected)


# What torch's classes do not have, where it is asked for.
ASKED = {"AdamW": {"state_dtype": torch.bfloat16}, "Adagrad": {"decoupled_weight_decay": True}}


def load_what_torch_has_not(library, name, folder, form, options, saved):
    """The numbers are those that were saved, and the optimizer goes on with them as one over whole tensors does."""
    model, opt = reader_of(library, name, **options)
    planner = None
    if form in ("nested", "flat"):
        stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        if not all(any(at.endswith(key) for at in stored) for key in options):
            with pytest.raises(dcp.CheckpointException, match="Missing key in checkpoint state_dict"):
                read(model, opt, folder, form)
            planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    read(model, opt, folder, form, planner)
    [group] = values(opt)
    assert group["lr"] == ROW[name].full["lr"]
    assert {key: group.get(key) for key in options} == options
    params, states = copy.deepcopy(saved)  # which came in memory that all processes share
    # States come in the dtype that was asked for, or in that of the local checkpoint.
    if form != "full" or "state_dtype" in options:
        dtype = options.get("state_dtype", torch.float64)
        states = [{key: s if key == "step" else s.to(dtype) for key, s in state.items()} for state in states]
    assert_equal(contents(opt), (params, states), rtol=0, atol=0)
    alone = Alone(lambda params: getattr(LIBRARIES[library], name)(params, **{**ROW[name].full, **options}), opt)
    for p, state in zip(alone.params, states, strict=True):
        alone.opt.state[p] = state
    for step in range(3, 6):
        backward(model, step, apart=0)
        with only_kernels(TENSORS) if library == "onepass" else contextlib.nullcontext():
            opt.step()
        alone.step()
    alone.compare()


# Of a key that the reader's groups have not, torch makes a KeyError where the checkpoint is a gathered one ("full"), or
# gives it to rank 0 alone ("broadcast"). So readers that have not been asked take no gathered ones here.
@pytest.mark.parametrize(
    ("writer", "reader", "form"),
    [(writer, "asked", form) for writer in ("torch", "onepass", "asked") for form in FORMS]
    + [("asked", reader, form) for reader in ("torch", "onepass") for form in ("nested", "flat")],
)
@pytest.mark.parametrize("name", ASKED)
def test_checkpoint_and_what_torch_has_not(processes, tmp_path, writer, reader, name, form):
    libraries = [library.replace("asked", "onepass") for library in (writer, reader)]
    options = [ASKED[name] if library == "asked" else {} for library in (writer, reader)]
    saved, _ = processes(2, save, libraries[0], name, tmp_path, form, options[0])
    processes(4, load_what_torch_has_not, libraries[1], name, tmp_path, form, options[1], saved)


def state_dict_before_the_first_step(name):
    ends = []
    for library in LIBRARIES:
        model = shard(net())
        opt = make(library, name, model)
        before = [whole(p) for p in model.parameters()]
        dcp_state.get_optimizer_state_dict(model, opt)
        params, states = contents(opt)
        assert_equal(params, before, rtol=0, atol=0)
        assert all(group["lr"] == ROW[name].full["lr"] for group in opt.param_groups)
        assert all(p.grad is None for p in model.parameters())
        ends.append((params, states))
    assert all(states for states in ends[0][1])
    assert_equal(*ends)


@pytest.mark.parametrize("name", SHARDED)
def test_state_dict_before_the_first_step(processes, name):
    processes(2, state_dict_before_the_first_step, name)


# -- tensor parallel, and meshes of two dimensions -------------------------------------------------------------------


class Block(torch.nn.Module):
    """What tensor parallelism spreads, and a norm that it leaves as it is."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.norm = torch.nn.LayerNorm(4)
        self.up = Linear(4, 8)
        self.down = Linear(8, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def tensor_parallel(name):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(Block(), mesh, PLAN)
    ours, theirs = classes(name)
    opt = ours(model.parameters())
    alone = Alone(theirs, opt)
    kinds = {type(p.data) for p in model.parameters()}
    assert kinds == {torch.Tensor, DTensor}
    for step in range(3):
        backward(model, step, apart=0, width=4)
        with only_kernels(6):
            opt.step()
        alone.step()
        alone.compare()
    assert_kernels(opt)
    assert_placed(opt)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion"])
def test_tensor_parallel_with_plain_parameters_in_the_same_group(processes, name, world):
    processes(world, tensor_parallel, name)


def hybrid_shard():
    both(*classes("AdamW"), shard(net(), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))))


def test_hybrid_shard(processes):
    processes(4, hybrid_shard)


def fsdp_and_tensor_parallel():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = fully_shard(parallelize_module(Block(), mesh["tensor"], PLAN), mesh=mesh["data"])
    opt = both(*classes("AdamW"), model, width=4, tensors=6)
    assert len({p.placements for p in params_of(opt)}) == 4


def test_fsdp_and_tensor_parallel(processes):
    processes(4, fsdp_and_tensor_parallel)


# -- gradients that are placed otherwise -----------------------------------------------------------------------------

PLACES = {"Shard(0)": Shard(0), "Shard(1)": Shard(1), "Replicate": Replicate(), "Partial": Partial()}


def placed(parameter, gradient, name):
    ends = []
    for make in classes(name):
        torch.manual_seed(0)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        p = Parameter(distribute_tensor(torch.randn(3, 5), mesh, [PLACES[parameter]]))
        opt = make([p])
        before = onepass.stats()
        for step in range(3):
            g = torch.randn(3, 5)
            if gradient == "Partial":
                p.grad = DTensor.from_local(g / 2 + dist.get_rank() + step, mesh, [Partial()])
            else:
                p.grad = distribute_tensor(g, mesh, [PLACES[gradient]])
            kept = p.grad._local_tensor.clone()
            opt.step()
            assert_equal(p.grad._local_tensor, kept, rtol=0, atol=0)
            assert p.grad.placements == (PLACES[gradient],)
        assert p.placements == (PLACES[parameter],)
        if opt.__class__.__module__.startswith("onepass"):
            [row] = onepass.explain(opt)
            told = {why: n - before["torch"].get(why, 0) for why, n in onepass.stats()["torch"].items()}
            path = row.path, row.reason, {why: n for why, n in told.items() if n}
        ends.append(contents(opt))
    assert_equal(*ends)
    return path


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("gradient", PLACES)
@pytest.mark.parametrize("parameter", ["Shard(0)", "Shard(1)", "Replicate"])
def test_gradient_placed_otherwise(processes, parameter, gradient, name):
    why = "DTensor whose gradient is placed otherwise"
    expected = ("kernel", "", {}) if parameter == gradient else ("torch", why, {why: 3})
    assert processes(2, placed, parameter, gradient, name) == [expected] * 2


# -- wrappers of torch.distributed -----------------------------------------------------------------------------------


def wrapped(run, name):
    """Runs with our class and with torch's; ours by kernels alone."""
    ours, theirs = ROW[name].ours, ROW[name].theirs
    with only_kernels():
        actual = run(ours, ROW[name].full)
    assert_equal(actual, run(theirs, ROW[name].full))


def data_parallel(cls, options):
    model = torch.nn.parallel.DistributedDataParallel(net(), gradient_as_bucket_view=True)
    opt = cls(model.parameters(), **options)
    for step in range(3):
        backward(model, step)
        opt.step()
    return contents(opt)


def zero(cls, options):
    model = torch.nn.parallel.DistributedDataParallel(net())
    opt = ZeroRedundancyOptimizer(model.parameters(), cls, parameters_as_bucket_view=True, **options)
    for step in range(2):
        backward(model, step)
        opt.step()
    assert str(onepass.explain(opt)) == str(onepass.explain(opt.optim))
    opt.consolidate_state_dict()  # all states, in rank 0 alone
    saved = [copy.deepcopy(opt.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved, src=0)
    backward(model, 2)
    opt.step()
    opt.load_state_dict(saved[0])
    for step in range(3, 5):
        backward(model, step)
        opt.step()
    return [p.detach().clone() for p in model.parameters()], saved[0]["state"]


def local_sgd(cls, options):
    model = net()
    averager = PeriodicModelAverager(period=2, warmup_steps=1)
    opt = PostLocalSGDOptimizer(cls(model.parameters(), **options), averager)
    for step in range(5):
        backward(model, step)
        opt.step()
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    backward(model, 5)
    opt.step()
    return contents(opt)


def in_backward(cls, options):
    model = net()
    _apply_optimizer_in_backward(cls, model.parameters(), dict(options))
    for step in range(3):
        backward(model, step)
        assert all(p.grad is None for p in model.parameters())
    return [p.detach().clone() for p in model.parameters()]


RUNS = [data_parallel, zero, local_sgd, in_backward]


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad"])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_wrapper(processes, run, name):
    processes(2, wrapped, run, name)


# -- our own features ------------------------------------------------------------------------------------------------


def lookahead():
    ours, theirs = classes("AdamW")
    opt = both(
        lambda params: onepass.Lookahead(ours(params), k=2),
        lambda params: onepass.Lookahead(theirs(params), k=2),
        shard(net()),
        steps=5,
    )
    with opt.slow_weights():
        slow = [whole(p) for p in params_of(opt)]
    assert_equal(slow, [whole(opt.state[p]["slow_param"]) for p in params_of(opt)], rtol=0, atol=0)


@pytest.mark.parametrize("world", [2, 4])
def test_lookahead(processes, world):
    processes(world, lookahead)


def stale():
    """Autograd notices that what it has saved was stepped; as with torch's, the DTensor's version alone tells."""
    model = shard(net())
    opt = onepass.SGD(model.parameters(), lr=0.1)
    backward(model, 0)
    p = model[0].weight
    saved, versions = (p**2).sum(), (p._version, p._local_tensor._version)
    opt.step()
    assert (p._version, p._local_tensor._version) == (versions[0] + 1, versions[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_autograd_notices_the_step(processes):
    processes(2, stale)


def sharded_in_backward():
    """FSDP hands a gradient over when it is averaged and spread, and adds up those of micro-batches itself."""
    runs = []
    for inside in (False, True):
        model = shard(net())
        opt = onepass.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
        handle = onepass.step_in_backward(opt) if inside else None
        for step in range(4):
            with handle.accumulate() if handle and step == 1 else contextlib.nullcontext():
                add_gradients(model, step)
            if step == 1:
                continue
            if inside:
                assert all(p.grad is None for p in model.parameters())
            else:
                opt.step()
                opt.zero_grad()
        runs.append(contents(opt))
    assert_equal(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("world", [2, 4])
def test_step_in_backward_of_a_sharded_model(processes, world):
    processes(world, sharded_in_backward)


def averaged_too_late():
    model = net()
    whole_model = torch.nn.parallel.DistributedDataParallel(model)
    onepass.step_in_backward(onepass.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match=r"DistributedDataParallel.* does not work"):
        backward(whole_model, 0)


def test_step_in_backward_refuses_ddp(processes):
    processes(2, averaged_too_late)


class Notes(dict):
    def add_scalar(self, tag, value, step):
        if "seconds" not in tag:
            self[tag, step] = value


def log_to(library, k):
    model = shard(net())
    ours = make(library, "AdamW", model)
    alone = Alone(classes("AdamW")[1], ours)
    notes, expected = Notes(), Notes()
    with contextlib.ExitStack() as stack:
        stack.enter_context(onepass.log_to(notes, ours, interval=k))
        stack.enter_context(onepass.log_to(expected, alone.opt, interval=k))
        for step in range(4):
            backward(model, step)
            ours.step()
            alone.step()
    assert len(expected) == 4 * (4 // k)
    assert_equal(dict(notes), dict(expected))
    alone.compare()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("library", LIBRARIES)
def test_log_to_tells_norms_of_whole_tensors(processes, library, world):
    processes(world, log_to, library, 2)


def log_to_without_gradients(missing):
    """The second process lacks gradients that the first one has."""
    mesh = init_device_mesh("cpu", (2,))
    params = [
        Parameter(distribute_tensor(torch.ones(shape), mesh, [place]))
        for shape, place in (((3, 4), Shard(0)), ((2, 2), Replicate()), ((5,), Shard(0)))
    ]
    counted = 0  # elements of the gradients, which are 2
    for i, p in enumerate(params):
        lacks = i in missing
        counted += p.numel() if not lacks or p.placements[0].is_replicate() else -(-p.shape[0] // 2) * p[0].numel()
        if not lacks or dist.get_rank() == 0:
            p.grad = distribute_tensor(torch.full(p.shape, 2.0), mesh, p.placements, src_data_rank=None)
    notes, opt = Notes(), onepass.SGD(params, lr=0.1)
    with onepass.log_to(notes, opt, interval=1):
        opt.step()
    assert_equal(notes["optimizer/grad_norm", 0], 2 * counted**0.5)
    return notes["optimizer/grad_norm", 0]


@pytest.mark.parametrize("missing", [{2}, {0, 2}, {0, 1, 2}])
def test_log_to_without_gradients_on_one_process(processes, missing):
    first, second = processes(2, log_to_without_gradients, missing)
    assert first == second


def log_to_tensor_parallel():
    model = parallelize_module(Block(), init_device_mesh("cpu", (2,)), PLAN)
    ours, theirs = classes("AdamW")
    opt = ours(model.parameters())
    alone = Alone(theirs, opt)
    notes, expected = Notes(), Notes()
    with onepass.log_to(notes, opt, interval=1), onepass.log_to(expected, alone.opt, interval=1):
        for step in range(2):
            backward(model, step, apart=0, width=4)
            opt.step()
            alone.step()
    assert_equal(dict(notes), dict(expected))


def test_log_to_of_plain_parameters_and_dtensors(processes):
    processes(2, log_to_tensor_parallel)


class StopTest(Exception):
    pass


def lr_find(kind):
    """A model goes on as one that was not tested, also if a forward pass has gathered parameters."""
    x, y = torch.linspace(-1, 1, 12).view(4, 3), torch.ones(4, 2)
    spread = fully_shard if kind == "after a forward pass" else shard  # all in one part, so that all are gathered
    ends = []
    for is_tested in (False, True):
        model = spread(net())
        average = AveragedModel(net(), decay=0.9)
        spread(average.module)
        average.update_parameters(model)
        opt = onepass.AdamW(model.parameters(), average=average)
        train(model, opt, range(2))
        losses = []

        def loss_fn(output, target, losses=losses):
            losses.append((output - target).square().mean())
            if kind == "after an exception" and len(losses) == 3:
                raise StopTest
            return losses[-1]

        if kind == "after a forward pass":
            with torch.no_grad():
                model(x)
                average(x)
        if is_tested:
            with pytest.raises(StopTest) if kind == "after an exception" else contextlib.nullcontext():
                onepass.lr_find(model, opt, loss_fn, [(x, y)], steps=4, progress=False)
            assert losses
        with torch.no_grad():
            outputs = [model(x), average(x)]
        for part in (model, average.module):
            part.reshard()
        train(model, opt, range(2, 4))
        ends.append((outputs, contents(opt), [whole(p) for p in average.module.parameters()]))
    assert_equal(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["after a step", "after a forward pass", "after an exception"])
def test_lr_find(processes, kind):
    processes(2, lr_find, kind)


def scaled(overflows, fused):
    model = shard(net())
    ours, theirs = classes("AdamW", fused=fused)
    opt = ours(model.parameters())
    alone = Alone(theirs, opt)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        backward(model, step)
        skips = overflows and step == 1
        if not skips:
            alone.step()
        with torch.no_grad():
            for p in model.parameters():
                p.grad._local_tensor.mul_(8.0)
            if skips and dist.get_rank() == 1:
                next(model.parameters()).grad._local_tensor.view(-1)[0] = torch.inf
        scaler.scale(torch.ones(()))  # makes its tensors
        with only_kernels(TENSORS) if not skips else contextlib.nullcontext():
            scaler.step(opt)
        scaler.update(8.0)
        alone.compare()


@pytest.mark.parametrize("overflows", [False, True])
@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler(processes, overflows, fused):
    processes(2, scaled, overflows, fused)


def small_states():
    """Their bits are those over whole tensors, by our class."""
    torch.set_default_dtype(torch.float32)
    ours, _ = classes("AdamW", state_dtype=torch.bfloat16)
    opt = both(ours, ours, shard(net()), rtol=0, atol=0)
    kinds = {state["exp_avg"].dtype for state in opt.state.values()}
    assert kinds == {torch.bfloat16}


def test_states_in_bfloat16(processes):
    processes(4, small_states)


def masters(kind):
    """Their bits are those over whole tensors, also after a change and from a checkpoint."""
    torch.set_default_dtype(torch.bfloat16)
    ours, _ = classes("AdamW", master=kind)
    model = shard(net())
    opt = ours(model.parameters())
    alone = Alone(ours, opt)

    def step(number):
        backward(model, number)
        opt.step()
        alone._opt = opt
        alone.step()
        alone.compare(rtol=0, atol=0)

    for number in range(3):
        step(number)
    assert_kernels(opt)
    assert_placed(opt)
    with torch.no_grad():
        for p in (*model.parameters(), *alone.params):
            p.mul_(0.75)
    step(3)
    step(4)
    saved = opt.state_dict()
    opt = ours(model.parameters())
    opt.load_state_dict(saved)
    step(5)
    assert_placed(opt)
    torch_dict = dcp_state.get_optimizer_state_dict(model, opt)
    opt = ours(model.parameters())
    before = [whole(p) for p in model.parameters()]
    dcp_state.set_optimizer_state_dict(model, opt, torch_dict)
    assert_equal([whole(p) for p in model.parameters()], before, rtol=0, atol=0)
    step(6)
    with torch.autograd.forward_ad.dual_level():  # torch's implementation steps within this context
        backward(model, 7)
        opt.step()
        alone.step()
    alone.compare(rtol=1e-2, atol=1e-6)
    assert_placed(opt)


@pytest.mark.parametrize("kind", ["split", "float32"])
def test_master_weights(processes, kind):
    processes(4, masters, kind)


def single_precision():
    """Float32: the same bits as over whole tensors by our class, and torch's but for rounding."""
    torch.set_default_dtype(torch.float32)
    ours, theirs = classes("AdamW")
    both(ours, ours, shard(net()), rtol=0, atol=0)
    both(ours, theirs, shard(net()), rtol=1e-4, atol=1e-6)


def test_float32(processes):
    processes(2, single_precision)


def clipped():
    model = shard(net())
    ours, theirs = classes("SGD")
    opt = ours(model.parameters())
    alone = Alone(theirs, opt)
    for step in range(3):
        backward(model, step)
        before = [whole(p.grad) for p in model.parameters()]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        expected = torch.cat([g.flatten() for g in before]).norm()
        assert_equal(whole(norm), expected)
        assert expected > 0.5
        with only_kernels(TENSORS):
            opt.step()
        alone.step()
        alone.compare()


def test_clip_grad_norm(processes):
    processes(4, clipped)


# -- bad input -------------------------------------------------------------------------------------------------------


def ones(*shape, mesh, dtype=None, place=None):
    return distribute_tensor(torch.ones(*shape, dtype=dtype), mesh, place or [Shard(0)])


def another_mesh():
    return {"mesh": init_device_mesh("cpu", (2, 1)), "place": [Shard(0), Replicate()]}


def part_of(size, mesh):
    """One of that many elements, of which this process holds two at any rate."""
    return DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False, shape=(size,), stride=(1,))


def spoiled(what, mesh):
    """What becomes of a gradient or state of 3 elements: where it is given, and what."""
    return {
        "gradient of one process": lambda: ("grad", part_of(3, mesh)),
        "gradient over another mesh": lambda: ("grad", ones(3, **another_mesh())),
        "plain gradient": lambda: ("grad", torch.ones(3)),
        "size of a state": lambda: ("exp_avg", ones(4, mesh=mesh)),
        "size of a state of one process": lambda: ("exp_avg", part_of(4, mesh)),
        "part of a state of one process": lambda: ("exp_avg", part_of(3, mesh)),
        "dtype of a state": lambda: ("exp_avg", ones(3, mesh=mesh, dtype=torch.int64)),
        "complex state": lambda: ("exp_avg", ones(3, mesh=mesh, dtype=torch.complex128)),
        "state over another mesh": lambda: ("exp_avg", ones(3, **another_mesh())),
        "plain state": lambda: ("exp_avg", torch.ones(3)),
        "plain state of the part": lambda: ("exp_avg", torch.ones(0 if dist.get_rank() else 2)),
        "state that is no tensor": lambda: ("exp_avg", "text"),
    }[what]()


def bad(what):
    """All that is good comes first, and is not to be written either; what each process is told."""
    model = shard(net())
    opt = classes("AdamW")[0](model.parameters())
    backward(model, 0)
    opt.step()
    backward(model, 1)
    p = model[2].bias  # 3 elements
    alone = Alone(classes("AdamW")[1], opt)
    for q, whole_q in zip(params_of(opt), alone.params, strict=True):
        alone.opt.state[whole_q] = {name: whole(s) for name, s in opt.state[q].items()}
    good = p.grad, opt.state[p]["exp_avg"]
    if "of one process" not in what or dist.get_rank() == 1:
        where, x = spoiled(what, p.device_mesh)
        if where == "grad":
            p.grad = x
        else:
            opt.state[p][where] = x

    def numbers():
        held = [t._local_tensor for q in params_of(opt) for t in (q.detach(), opt.state[q]["exp_avg_sq"])]
        return copy.deepcopy([held, [opt.state[q]["step"] for q in params_of(opt)]])

    before = numbers()
    try:
        opt.step()
        told = "stepped"
    except ValueError as error:
        told = str(error)
        assert_equal(numbers(), before, rtol=0, atol=0)
        # Mended, it is where it was; so a process that has stepped and one that has not are not the worse for it.
        p.grad, opt.state[p]["exp_avg"] = good
        opt.step()
    alone.step()
    alone.compare()
    return told


PLACE = "AdamW: parameter 3 of group 0 (shape [3], torch.float64): "
BAD = {
    "gradient of one process": ["stepped", PLACE + "its gradient has shape [2] and dtype torch.float64"],
    "gradient over another mesh": [PLACE + "its gradient is spread over another mesh"] * 2,
    "plain gradient": [PLACE + "its gradient is not a DTensor"] * 2,
    "size of a state": [PLACE + "its state exp_avg has shape [4]"] * 2,
    "size of a state of one process": ["stepped", PLACE + "its state exp_avg has shape [4]"],
    "part of a state of one process": ["stepped", PLACE + "its state exp_avg has shape [2] and dtype torch.float64"],
    "dtype of a state": [PLACE + "its state exp_avg has dtype torch.int64"] * 2,
    "complex state": [PLACE + f"its state exp_avg has shape [{n}] and dtype torch.complex128" for n in (2, 1)],
    "state over another mesh": [PLACE + "its state exp_avg is spread over another mesh"] * 2,
    "plain state": [PLACE + "its state exp_avg is not a DTensor"] * 2,
    "plain state of the part": [PLACE + "its state exp_avg is not a DTensor"] * 2,
    "state that is no tensor": [PLACE + "its state exp_avg is not a tensor"] * 2,
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_before_anything_is_written(processes, what):
    assert processes(2, bad, what) == BAD[what]


def replicated_by_torch():
    """Plain tensors where torch takes them for replicated ones; it steps such a parameter then."""
    ends = []
    for make in classes("AdamW"):
        model = shard(net())
        opt = make(model.parameters())
        for step in range(2):
            backward(model, step)
            p = model[2].bias
            p.grad = torch.ones(3)
            with implicit_replication():
                opt.step()
        ends.append(contents(opt))
    assert_equal(*ends)


def test_plain_gradient_that_torch_may_take_for_a_replicated_one(processes):
    processes(2, replicated_by_torch)
