"""Real processes that stay up from test to test, in one process group over gloo.

``Processes()(2, function, *args)`` runs a function in two of them, as ranks 0 and 1, and returns what both returned. A
call in which one fails, or that takes too long, ends them all: the next call starts others.
"""

import faulthandler
import multiprocessing
import multiprocessing.connection
import time
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

LIMIT = 40  # seconds that a call may take, the start of the processes included


def serve(rank, calls):
    """What a process does."""
    # After a fatal signal, the Python code of all threads is printed, and before it the C++ code, also that of gloo's.
    faulthandler.enable()
    torch._C._set_print_stack_traces_on_fatal_signal(True)
    torch.set_num_threads(1)
    # Ours stay errors, torch's own parts warn of each other.
    warnings.filterwarnings("ignore", module=r"torch\b")
    while True:
        world, store, function, args = calls.recv()
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        try:
            if not dist.is_initialized():
                join(store, rank, world)
            try:
                answer = function(*args)
                dist.barrier()
            finally:
                forget_meshes()
            calls.send((answer, None))
        except BaseException:
            calls.send((None, traceback.format_exc()))


def join(store, rank, world):
    """Joins the process group."""
    patience = timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=patience)


def forget_meshes():
    """Destroys the groups that meshes have made, and clears torch's caches of DTensors, which hold such meshes."""
    for group in set(_world.pg_map) - {dist.group.WORLD}:
        dist.destroy_process_group(group)
    _clear_sharding_prop_cache()
    _gen_transform_infos.cache_clear()


class Processes:
    """The processes, which are started when they are first needed: others for each number of them.

    So each stays in one process group. To leave one and join another takes as long as many a test.
    """

    def __init__(self, folder):
        self._folder = folder  # for the files over which groups find together
        self._groups = 0
        self._started = {}  # number of processes -> the file of their group, and of each the process and its pipe

    def __call__(self, world, function, *args):
        """Runs a function in this many processes; returns what each returned, or raises with the first's traceback."""
        if world not in self._started:
            self._start(world)
        store, started = self._started[world]
        for _, calls in started:
            calls.send((world, store, function, args))
        return self._answers(world)

    def _answers(self, world):
        waiting = {calls: rank for rank, (_, calls) in enumerate(self._started[world][1])}
        answers = {}
        until = time.monotonic() + LIMIT
        failed = f"no answer within {LIMIT} s of ranks "
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), timeout=max(0, until - time.monotonic()))
            if not ready:
                self._end(world)
                raise AssertionError(failed + ", ".join(map(str, waiting.values())))
            for calls in ready:
                rank = waiting.pop(calls)
                try:
                    answers[rank], error = calls.recv()
                except EOFError:
                    error = "the process has died"
                if error is not None:
                    self._end(world)  # the others wait for it
                    raise AssertionError(f"rank {rank} of {world}: {error}")
        return [answers[rank] for rank in range(world)]

    def _start(self, world):
        context = multiprocessing.get_context("spawn")  # a fork would take torch's threads along
        self._groups += 1
        started = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
        self._started[world] = self._folder / f"group{self._groups}", started

    def _end(self, world):
        _, started = self._started.pop(world)
        for process, calls in started:
            process.kill()
            process.join()
            calls.close()

    def end(self):
        for world in list(self._started):
            self._end(world)
