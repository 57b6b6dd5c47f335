"""The gallery's local SGD, in real processes: beside a simulation in one, and what goes over the wire."""

import functools
import multiprocessing
import os
import socket
import stat
import struct
from dataclasses import dataclass

import numpy as np
import onepass
import pytest
import torch
import torch.distributed as dist
from onepass.cli.demo import digits
from onepass.examples import local_sgd
from onepass.examples.common import Gallery
from onepass.examples.local_sgd import MOMENTUM, Plan, launch
from torch.multiprocessing import ProcessRaisedException
from torch.nn.functional import cross_entropy

STEPS, SIZE, TENSORS = 8, 151_306, 8  # parameters of the net, and the tensors that hold them
DOUBLE = torch.float64
DDP, ONE, FOUR = (Plan(period, dtype=DOUBLE) for period in (None, 1, 4))
DDP32, ONE32, FOUR32 = (Plan(period) for period in (None, 1, 4))
ADAMS = Plan(None, "Adam", DOUBLE), Plan(1, "Adam", DOUBLE)
PLAIN = Plan(None, "SGD", DOUBLE), Plan(1, "SGD", DOUBLE)


# -- in the processes ------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the processes have come to: models of shape (steps + 1, processes, parameters)."""

    models: np.ndarray
    buffers: np.ndarray  # momentum, of shape (processes, parameters), after the last step
    reduced: list[int]
    by_sockets: int  # bytes that this process's sockets have sent
    kernel: list[int]  # tensors that onepass's kernels have stepped, in each process
    torch: list[dict]  # and torch's code


def watch(plans):
    """Trains by each plan and yields all that can be seen of it."""
    optimizers = []
    share = local_sgd.share

    def remembered(*args):
        model, optimizer = share(*args)
        optimizers.append(optimizer)
        return model, optimizer

    local_sgd.share = remembered
    task = digits("sgd", quick=False)
    for plan in plans:
        stepped, sent = sum(onepass.stats()["kernel"].values()), sent_by_sockets()
        run = local_sgd.train(task, plan, STEPS, 1)
        sent = sent_by_sockets() - sent
        stepped = sum(onepass.stats()["kernel"].values()) - stepped
        states = [s.get("momentum_buffer") for s in optimizers.pop().state.values()]
        buffers = torch.cat([s.flatten() for s in states]) if plan.optimizer == MOMENTUM else torch.empty(0)
        yield Seen(
            torch.stack([gathered(model) for model in run.models]).numpy(),
            gathered(buffers).numpy(),
            run.reduced,
            sent,
            gathered(torch.tensor(stepped)).tolist(),
            everyones(onepass.stats()["torch"]),
        )


def gathered(tensor):
    """The tensors of all processes."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


def everyones(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sent_by_sockets():
    """What the kernel has counted, of all TCP connections of this process: tcpi_bytes_sent of linux/tcp.h."""
    total = 0
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            is_socket = stat.S_ISSOCK(os.fstat(number).st_mode)
        except OSError:  # it was the folder itself
            continue
        if is_socket:
            with socket.socket(fileno=os.dup(number)) as connection:
                if connection.family != socket.AF_UNIX:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", info, 200)[0]
    return total


def fail():
    """The first process fails while the others wait for it."""
    yield "begun"
    if dist.get_rank() == 0:
        raise ValueError("the learning rate ran away")
    dist.barrier()


def wait():
    yield from range(3)
    if dist.get_rank():
        dist.barrier()


# -- beside a simulation ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two():
    plans = (DDP, ONE, FOUR, DDP32, ONE32, FOUR32, *PLAIN, *ADAMS)
    return dict(zip(plans, launch(2, watch, plans), strict=True))


@pytest.fixture(scope="module")
def four():
    plans = (DDP, FOUR)
    return dict(zip(plans, launch(4, watch, plans), strict=True))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def simulated(period, ranks):
    """All models before each step and after the last: SGD with momentum, written out, in one process."""
    task = digits("sgd", quick=False)
    torch.manual_seed(0)
    net = task.build().double()
    names = [name for name, _ in net.named_parameters()]
    models = [[p.detach().clone() for p in net.parameters()] for _ in range(ranks)]
    velocities = [[torch.zeros_like(p) for p in model] for model in models]
    generators = [torch.Generator().manual_seed(1 + rank) for rank in range(ranks)]
    path = []
    for step in range(STEPS + 1):
        path.append(np.array([np.concatenate([p.numpy().ravel() for p in model]) for model in models]))
        for model, velocity, generator in zip(models, velocities, generators, strict=True):
            images, labels = (part[:16] for part in task.draw(generator))
            inputs = [p.clone().requires_grad_() for p in model]
            out = torch.func.functional_call(net, dict(zip(names, inputs, strict=True)), images.double())
            for p, v, g in zip(model, velocity, torch.autograd.grad(cross_entropy(out, labels), inputs), strict=True):
                v.mul_(0.9).add_(g)
                p.sub_(0.02 * v)
        if step % period == 0:
            for same in zip(*models, strict=True):
                average = sum(same) / ranks
                for p in same:
                    p.copy_(average)
    return np.array(path)


@pytest.mark.parametrize("plan", [ONE, FOUR], ids=lambda plan: plan.name)
def test_as_simulated_in_one_process(two, plan):
    np.testing.assert_allclose(two[plan].models, simulated(plan.period, 2), rtol=0, atol=1e-13)
    assert np.abs(two[plan].models - simulated(2, 2)).max() > 1e-4


def test_four_processes_as_simulated(four):
    np.testing.assert_allclose(four[FOUR].models, simulated(4, 4), rtol=0, atol=1e-13)
    assert np.abs(four[FOUR].models - simulated(1, 4)).max() > 1e-4


# -- H = 1 and DDP ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plans", [(DDP, ONE), PLAIN], ids=["momentum", "plain"])
def test_h_1_is_ddp(two, plans):
    ddp, one = (two[plan].models for plan in plans)
    assert (ddp[1:] != ddp[:-1]).any(2).all()
    np.testing.assert_allclose(one, ddp, rtol=0, atol=1e-14)


def test_h_1_is_ddp_in_float32(two):
    ddp, one, four = (two[plan].models[:, 0].astype(float) for plan in (DDP32, ONE32, FOUR32))
    rounding = 4 * STEPS * np.finfo(np.float32).eps / 2 * np.abs(ddp).max()  # a few times in each step
    # Rounding may turn a unit of the net on or off whose input is next to zero, and with it some weights' gradients.
    assert (np.abs(one - ddp) > rounding).mean() < 0.005 < 0.5 < (np.abs(four - ddp) > rounding)[-1].mean()
    way = np.linalg.norm(ddp[-1] - ddp[0])
    assert np.linalg.norm(one - ddp, axis=1).max() < 1e-3 * way
    assert np.linalg.norm(four - ddp, axis=1).max() > 1e-1 * way


def test_adam_with_h_1_is_not_ddp(two):
    ddp, one = (two[plan].models for plan in ADAMS)
    moved = np.linalg.norm(ddp[-1, 0] - ddp[0, 0])
    assert np.linalg.norm(one[-1, 0] - ddp[-1, 0]) > 0.1 * moved > 0


def test_momentum_stays_local_and_its_mean_is_ddps(two):
    ddp, one = two[DDP].buffers, two[ONE].buffers
    assert (ddp[0] == ddp[1]).all()
    assert np.abs(one[0] - one[1]).max() > 0.1 * np.abs(ddp).max()
    np.testing.assert_allclose(one.mean(0), ddp[0], rtol=0, atol=1e-13)


# -- what is shared, and when ----------------------------------------------------------------------------------------


def test_processes_agree_to_the_bit_after_an_average_and_not_before(two, four):
    for models in (two[FOUR].models, two[FOUR32].models, four[FOUR].models):
        for step in range(1, STEPS + 1):
            for other in models[step, 1:]:
                assert (other == models[step, 0]).all() == (step % 4 == 1), step
    for plan in (DDP, ONE, DDP32, ONE32):
        assert (two[plan].models[:, 1] == two[plan].models[:, 0]).all()


@pytest.mark.parametrize("fixture", ["two", "four"])
def test_bytes(fixture, request):
    seen = request.getfixturevalue(fixture)
    ddp, four = seen[DDP], seen[FOUR]
    assert ddp.reduced == [8 * SIZE * step for step in range(STEPS + 1)]
    assert four.reduced == [8 * SIZE * -(-step // 4) for step in range(STEPS + 1)]
    assert ddp.reduced[-1] == 4 * four.reduced[-1]
    # Both have the same to send before the first step. A ring of n sends 2 (n - 1) / n of the bytes.
    sent = (ddp.by_sockets - four.by_sockets) / (ddp.reduced[-1] - four.reduced[-1])
    assert sent == pytest.approx({"two": 1.0, "four": 1.5}[fixture], rel=0.05)


def test_kernels_step_in_every_process(two, four):
    for seen in (*two.values(), *four.values()):
        assert seen.kernel == [STEPS * TENSORS] * seen.models.shape[1]
        assert not any(seen.torch)


# -- processes -------------------------------------------------------------------------------------------------------


def test_what_a_process_raises_is_raised_here():
    stream = launch(2, fail)
    assert next(stream) == "begun"
    with pytest.raises(ProcessRaisedException, match="ValueError: the learning rate ran away"):
        next(stream)
    assert not multiprocessing.active_children()


def test_processes_end_with_their_reader():
    stream = launch(2, wait)
    assert next(stream) == 0
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert not multiprocessing.active_children()


def test_the_experiment(tmp_path, capsys):
    gallery = Gallery(tmp_path, quick=True)
    local_sgd.run(gallery)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    sent = [float(line[-3]) for line in lines if line[:1] == ["2"]]
    np.testing.assert_allclose(sent, [16 * 4e-6 * SIZE / h for h in (1, 1, 4, 16)], rtol=1e-3)
    assert [path.name for path in gallery.written] == ["local_sgd_losses.png", "local_sgd_processes.png"]
    assert all(path.stat().st_size > 1000 for path in gallery.written)
