"""The GPU of gpu.py and its clocks. On the CPU, for a dry run, all clocks are the wall clock."""

from __future__ import annotations

import functools
import math
import subprocess
import time
from collections.abc import Callable
from typing import Any

import onepass
import torch
from onepass.cli import timing
from onepass.cli.timing import Run

AHEAD = 0.004  # seconds in which the host launches a sample's steps: a device's queue holds 1,024 launches
MARGIN = 2.0  # the copies first last so many times as long as the host's launches
BUSY = 0.08  # the longest seconds of copies before a sample

Moment = torch.cuda.Event | float


class EventClock(timing.Clock):
    """The device's own clock: two events around the calls.

    Large copies before the first event keep the device busy while the host launches the calls. A sample has no more
    calls than the host can launch ahead. If the first event is over before the host has launched all calls, the device
    has waited for the host: the sample is then taken again after twice as many copies, up to BUSY seconds of them.

    Args:
        sample: Approximate seconds per sample.
        copy: Function that makes a large copy on the device.
        copy_seconds: How long a copy takes.

    Attributes:
        launch_bound: The calls whose last sample includes times in which the device waited for the host. It is for the
            caller to empty.
    """

    def __init__(self, sample: float, copy: Run, copy_seconds: float) -> None:
        super().__init__(sample, torch.cuda.synchronize)
        self.copy = copy
        self.copy_seconds = copy_seconds
        self.launch_bound: list[Run] = []

    def sampler(self, run: Run) -> Callable[[], float]:
        """Return a function that takes a sample and returns the device's seconds per call."""
        repeats = self.repeats(run)
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        launch = time.perf_counter() - start
        repeats = max(1, min(repeats, round(AHEAD / launch)))
        most = math.ceil(BUSY / self.copy_seconds)
        copies = min(most, math.ceil(MARGIN * repeats * launch / self.copy_seconds))

        def sample() -> float:
            nonlocal copies
            while True:
                seconds, is_ahead = self.busy_seconds(run, repeats, copies)
                if is_ahead or copies >= most:
                    break
                copies = min(most, 2 * copies)
            if run in self.launch_bound:
                self.launch_bound.remove(run)
            if not is_ahead:
                self.launch_bound.append(run)
            return seconds

        return sample

    def busy_seconds(self, run: Run, repeats: int, copies: int) -> tuple[float, bool]:
        """Take a sample.

        Returns:
            The device's seconds per call, and whether the host launched all calls before the device began with them.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(copies):
            self.copy()
        start.record()
        for _ in range(repeats):
            run()
        is_ahead = not start.query()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3 / repeats, is_ahead


class Device:
    """The device, its clocks and the reference copy.

    Args:
        name: torch's name of the device.
        sample: Approximate seconds per sample.
    """

    def __init__(self, name: str, sample: float) -> None:
        self.torch = torch.device(name)
        self.is_gpu = self.torch.type == "cuda"
        if self.is_gpu:
            self.torch = torch.device("cuda", self.torch.index or 0)  # set_device wants an index
            torch.cuda.set_device(self.torch)
        self.cache = torch.cuda.get_device_properties(self.torch).L2_cache_size if self.is_gpu else 1 << 20
        self._source = torch.randn((1 << 30 if self.is_gpu else 1 << 20) // 4, device=self.torch)
        self._target = torch.empty_like(self._source)
        self.copied = 2 * self._source.nbytes
        self.copy()
        self.wall = self.clock = timing.Clock(sample, torch.cuda.synchronize if self.is_gpu else None)
        self.copy_seconds = self.wall.seconds(self.copy, 10)
        if self.is_gpu:
            self.clock = EventClock(sample, self.copy, self.copy_seconds)

    def copy(self) -> None:
        """Make the reference copy, of `copied` bytes read and written."""
        self._target.copy_(self._source)

    def take_launch_bound(self) -> list[Run]:
        """Return the calls whose device time includes waiting for the host, and forget them."""
        found: list[Run] = []
        if isinstance(self.clock, EventClock):
            found, self.clock.launch_bound = self.clock.launch_bound, []
        return found

    def kernel_steps(self) -> int:
        """Return the number of tensors that our kernels have stepped."""
        count: int = onepass.stats()["kernel"].get(self.torch.type, 0)
        return count

    def now(self) -> Moment:
        """Return this moment in the device's work; the host does not wait."""
        if not self.is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Moment, end: Moment) -> float:
        """Return the seconds between two moments of :meth:`now`; wait for the second."""
        if isinstance(start, float) or isinstance(end, float):
            assert isinstance(start, float)
            assert isinstance(end, float)
            return end - start
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3

    def facts(self) -> dict[str, Any]:
        """Return a description of the device."""
        metadata: dict[str, Any] = {"copy rate, GB/s": round(self.copied / self.copy_seconds / 1e9, 1)}
        if self.is_gpu:
            properties = torch.cuda.get_device_properties(self.torch)
            metadata["GPU"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
            metadata["L2 cache"] = self.cache
            metadata["CUDA of torch"] = torch.version.cuda
            metadata["driver"] = driver()
        return metadata


def driver() -> str:
    """Return the version of NVIDIA's driver."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def captured(step: Run) -> Run:
    """Capture a step and return its replay. The replay keeps the step's tensors alive, whose memory it uses."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return functools.partial(_replay, graph, step)


def _replay(graph: torch.cuda.CUDAGraph, step: Run) -> None:
    graph.replay()
