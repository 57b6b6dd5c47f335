"""Several threads of the user's, each stepping, and how many threads a step wakes."""

import sys
import threading

import onepass
import pytest
import torch
from cases import each_row
from contract import assert_same, give_gradients, leaves, python, snapshot, train
from reference import params_of

# Enough for a step to wake a second thread of its own, beside tensors that it would not wake it for.
BIG = ((200_000,), (7,), (300, 500))
SMALL = ((5,), (3, 4))


def in_threads(*work):
    """Runs functions at the same time, each in a thread, and raises what they raise."""
    errors, barrier = [], threading.Barrier(len(work))

    def run(function):
        try:
            barrier.wait(timeout=60)
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


@each_row
@pytest.mark.parametrize("shapes", [SMALL, BIG], ids=["small", "big"])
def test_two_optimizers_in_two_threads(row, shapes):
    torch.set_num_threads(2)
    opts, alone = ([row.ours(leaves(shapes, torch.float32, seed), **row.full) for seed in (0, 1)] for _ in range(2))
    in_threads(*(lambda opt=opt, t=t: train(opt, 3, first=10 * t) for t, opt in enumerate(opts)))
    for t, opt in enumerate(alone):
        train(opt, 3, first=10 * t)
    assert_same([snapshot(opt) for opt in opts], [snapshot(opt) for opt in alone])


def test_complex_parameters_in_several_threads():
    """Whose shapes are not those that torch holds, while the threads take turns wherever torch lets go of the GIL."""
    interval = sys.getswitchinterval()

    def steps(opt):
        for _ in range(100):
            opt.step()

    opts = []
    for columns in range(2, 6):
        params = [torch.nn.Parameter(torch.zeros(rows, columns, dtype=torch.complex64)) for rows in range(3, 33)]
        opts.append(onepass.SGD(params, lr=1.0))
        for p in params:
            p.grad = torch.full_like(p, 1 + 2j).conj()
    try:
        sys.setswitchinterval(1e-6)
        in_threads(*(lambda opt=opt: steps(opt) for opt in opts))
    finally:
        sys.setswitchinterval(interval)
    for opt in opts:
        for p in params_of(opt):
            assert_same(p.detach(), torch.full_like(p, -100 + 200j))


@each_row
@pytest.mark.parametrize("shapes", [SMALL, BIG], ids=["small", "big"])
def test_one_optimizer_in_two_threads_makes_every_step_once(row, shapes):
    torch.set_num_threads(2)
    opt, alone = (row.ours(leaves(shapes, torch.float32), **row.full) for _ in range(2))
    for each in (opt, alone):
        give_gradients(params_of(each), 0)  # the same for every step, so that their order does not matter
    before = onepass.stats()

    def steps(count):
        for _ in range(count):
            opt.step()

    in_threads(lambda: steps(8), lambda: steps(8))
    assert sum(onepass.stats()["kernel"].values()) == sum(before["kernel"].values()) + 16 * len(shapes)
    for _ in range(16):
        alone.step()
    assert_same(snapshot(opt), snapshot(alone))


@each_row
def test_explain_and_stats_in_another_thread_do_not_disturb(row):
    opt, alone = (row.ours(leaves(BIG, torch.float32), **row.full) for _ in range(2))

    def look():
        for _ in range(20):
            assert [row.path for row in onepass.explain(opt)] == ["kernel"] * 3
            onepass.stats()

    give_gradients(params_of(opt), 0)
    in_threads(look, lambda: [opt.step() for _ in range(8)])
    give_gradients(params_of(alone), 0)
    for _ in range(8):
        alone.step()
    assert_same(snapshot(opt), snapshot(alone))


THREADS_OF_A_STEP = """
import os, torch, onepass
torch.set_num_threads(3)
p = torch.zeros(5_000, requires_grad=True)
p.grad = torch.ones(5_000)
before = len(os.listdir("/proc/self/task"))
onepass._core.force_bytes_per_thread({bytes})
onepass.SGD([p]).step()
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.cpu
@pytest.mark.parametrize(("bytes_per_thread", "threads"), [(1 << 12, 2), (0, 0)])
def test_what_all_threads_forces(bytes_per_thread, threads):
    """The fixture `all_threads` has this effect: a small step wakes two more threads, which it does not by itself."""
    assert python(THREADS_OF_A_STEP.format(bytes=bytes_per_thread)).stdout == f"{threads}\n"
