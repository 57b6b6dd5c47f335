"""Stochastic rounding in real processes: 8-bit states, and bfloat16 parameters with bfloat16 states.

A step has the bits of the step over whole tensors, also after a checkpoint of another number of processes.
"""

import functools

import onepass
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from onepass.optimizers import block_states
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

CODES = torch.float8_e4m3fn
CLASSES = ["AdamW", "Lion", "SGD"]
SHAPES = [(101, 80), (5, 3, 30, 11), (90, 64), (30,), (64,)]  # rows that 2 and 4 do not divide


# Arguments of the optimizer, and the dtype of the parameters.
WAYS = {"8 bits": ({"state_dtype": CODES}, torch.float32), "16 bits": ({"stochastic_rounding": True}, torch.bfloat16)}
each_way = pytest.mark.parametrize("way", WAYS)


def net(way):
    generator = torch.Generator().manual_seed(0)
    dtype = WAYS[way][1]
    return nn.ParameterList([nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES])


class Net(nn.Module):
    """Its parameters have the gradients that `step` gives them."""

    def __init__(self, way):
        super().__init__()
        self.params = net(way)


def arguments(way, name):
    return {"lr": 0.01, "rounding_seed": 3, **({"momentum": 0.9} if name == "SGD" else {}), **WAYS[way][0]}


def make(way, name, params):
    return getattr(onepass, name)(params, **arguments(way, name))


def gradients(number):
    generator = torch.Generator().manual_seed(100 + number)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def step(params, optimizer, number):
    for p, wide in zip(params, gradients(number), strict=True):
        grad = wide.to(p.dtype)
        is_whole = not hasattr(p, "device_mesh")
        p.grad = grad if is_whole else distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
    optimizer.step()


def own_rows(p, whole):
    """The part of a whole tensor that this process holds, by rows."""
    if not hasattr(p, "device_mesh"):
        return whole
    first = block_states.first_row(p)
    return whole[first : first + p.to_local().shape[0]]


def local(x):
    return x.to_local() if hasattr(x, "device_mesh") else x


def assert_bits_of_whole(params, optimizer, whole_params, whole_optimizer):
    for p, q in zip(params, whole_params, strict=True):
        assert torch.equal(local(p), own_rows(p, q))
        for name, value in optimizer.state[p].items():
            expected = whole_optimizer.state[q][name]
            if name == "step":
                assert value == expected
            elif value.element_size() == 1:
                assert torch.equal(local(value).view(torch.uint8), own_rows(p, expected.view(torch.uint8)))
                assert not hasattr(p, "placements") or value.placements == p.placements
            else:
                assert torch.equal(local(value), own_rows(p, expected))


def sharded(way, name, kind):
    torch.set_default_dtype(torch.float32)
    model, whole = Net(way), net(way)
    if kind == "fully_shard":
        fully_shard(model)
    elif kind == "hybrid":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("a", "b")))
    elif kind == "ddp":
        model = DistributedDataParallel(model).module
    params = list(model.parameters())
    optimizer, whole_optimizer = make(way, name, params), make(way, name, list(whole))
    before = onepass.stats()
    for number in range(4):
        step(params, optimizer, number)
        step(whole, whole_optimizer, number)
    assert onepass.stats()["torch"] == before["torch"]
    assert_bits_of_whole(params, optimizer, whole, whole_optimizer)


@pytest.mark.parametrize("kind", ["fully_shard", "hybrid", "ddp"])
@pytest.mark.parametrize("name", CLASSES)
@each_way
def test_the_bits_of_whole_tensors(processes, way, name, kind):
    processes(4, sharded, way, name, kind)


def divided_by_zero(way, name):
    """Each process has the bits of an optimizer of its share, and the whole state_dict loads into one process."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # here, because the import warns

    torch.set_default_dtype(torch.float32)
    params = list(net(way))
    zero = ZeroRedundancyOptimizer(params, getattr(onepass, name), **arguments(way, name))
    own = zero.optim.param_groups[0]["params"]
    assert 0 < len(own) < len(params)
    alone = [nn.Parameter(p.detach().clone()) for p in own]
    twin = make(way, name, alone)
    position = {id(p): at for at, p in enumerate(params)}
    for number in range(3):
        step(params, zero, number)
        for p, q in zip(own, alone, strict=True):
            q.grad = gradients(number)[position[id(p)]].to(q.dtype)
        twin.step()
    assert_bits_of_whole(own, zero.optim, alone, twin)
    zero.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        whole = list(net(way))
        loaded = make(way, name, whole)
        loaded.load_state_dict(zero.state_dict())
        for p, q in zip(params, whole, strict=True):
            assert all(
                "_scale" not in key or loaded.state[q][key].dtype == block_states.SCALES for key in loaded.state[q]
            )
            in_blocks = way == "8 bits" and block_states.fits(p)
            assert block_states.is_in_blocks(loaded.state[q][STATES[name]]) == in_blocks
        step(whole, loaded, 3)
    return [p.detach() for p in params]


STATES = {"AdamW": "exp_avg", "Lion": "exp_avg", "SGD": "momentum_buffer"}


@pytest.mark.parametrize("name", CLASSES)
@each_way
def test_zero_redundancy_optimizer(processes, way, name):
    first, second = processes(2, divided_by_zero, way, name)
    assert all(map(torch.equal, first, second))


def other_placements(way):
    torch.set_default_dtype(torch.float32)
    mesh = init_device_mesh("cpu", (2,))
    for placement in (Shard(1), Replicate()):
        whole = torch.ones(64, 128, dtype=WAYS[way][1])
        p = nn.Parameter(distribute_tensor(whole, mesh, [placement]))
        p.grad = distribute_tensor(whole, mesh, [placement])
        optimizer = make(way, "AdamW", [p])
        if placement == Replicate() or way == "16 bits":
            optimizer.step()
            assert {row.path for row in onepass.explain(optimizer)} == {"kernel"}
            continue
        with pytest.raises(ValueError, match="sharded along dimension 0 only"):
            optimizer.step()
        assert not optimizer.state


def refused_before_anything_is_written(by_torch):
    """Parameters before the one that cannot have 8-bit states are not stepped either."""
    torch.set_default_dtype(torch.float32)
    mesh = init_device_mesh("cpu", (2,))
    spread = [((8, 8), Shard(0)), ((64, 128), Shard(0)), ((64, 128), Shard(1))]
    params = [nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [place])) for shape, place in spread]
    for p in params:
        p.grad = distribute_tensor(torch.ones(p.shape), mesh, p.placements)
    optimizer = onepass.AdamW(params, state_dtype=CODES)
    step = functools.partial(optimizer._step_by_torch_alone, "a test", 1.0) if by_torch else optimizer.step
    with pytest.raises(ValueError, match="sharded along dimension 0 only"):
        step()
    assert all(torch.equal(local(p), torch.ones_like(local(p))) for p in params)
    assert not optimizer.state


@pytest.mark.parametrize("by_torch", [False, True])
def test_refused_before_anything_is_written(processes, by_torch):
    processes(2, refused_before_anything_is_written, by_torch)


@each_way
def test_other_placements(processes, way):
    processes(2, other_placements, way)


def save(way, name, folder):
    torch.set_default_dtype(torch.float32)
    model = fully_shard(Net(way))
    params = list(model.parameters())
    optimizer = make(way, name, params)
    for number in range(3):
        step(params, optimizer, number)
    states = dcp_state.get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder)


def load(way, name, folder):
    torch.set_default_dtype(torch.float32)
    model, whole = Net(way), net(way)
    if dist.get_world_size() > 1:
        fully_shard(model)
    params = list(model.parameters())
    optimizer, whole_optimizer = make(way, name, params), make(way, name, list(whole))
    states = dcp_state.get_state_dict(model, optimizer)
    held = dict(zip(("model", "optimizer"), states, strict=True))
    dcp.load(held, checkpoint_id=folder)
    dcp_state.set_state_dict(model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    for number in range(3):
        step(whole, whole_optimizer, number)
    for number in range(3, 5):
        step(params, optimizer, number)
        step(whole, whole_optimizer, number)
    assert_bits_of_whole(params, optimizer, whole, whole_optimizer)


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("name", CLASSES)
@each_way
def test_a_checkpoint_of_2_processes(processes, tmp_path, way, name, world):
    processes(2, save, way, name, tmp_path)
    processes(world, load, way, name, tmp_path)


def stepped_by_torch():
    """torch's implementation steps a shard with the random bits of the whole tensor, as the kernels do."""
    torch.set_default_dtype(torch.float32)
    mesh = init_device_mesh("cpu", (2,))
    whole = nn.Parameter(torch.randn(31, 40, generator=torch.Generator().manual_seed(0)).bfloat16())
    p = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None))
    optimizer, twin = make("16 bits", "SGD", [p]), make("16 bits", "SGD", [whole])
    for number in range(3):
        whole.grad = torch.full((31, 40), 0.3 + number).bfloat16()
        p.grad = distribute_tensor(whole.grad, mesh, [Shard(0)], src_data_rank=None)
        for each in (optimizer, twin):
            each._step_by_torch_alone("a test", 1.0)
        assert_bits_of_whole([p], optimizer, [whole], twin)


def test_stepped_by_torch(processes):
    processes(2, stepped_by_torch)
