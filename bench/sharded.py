"""Sharded models: step times over DTensors compared with plain tensors of the same sizes.

The process group has one process and uses gloo: a step needs no other process, and the cost of a DTensor is reading it.
The first contender steps plain tensors; `onepass, DTensor` should take at most 1.5 times as long.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from onepass.cli.bench import ADAMW, CHECKED_STEPS
from onepass.cli.timing import Result, Run, gradients, parameters, time_in_turn
from torch import Tensor

COUNTS = (100, 1000)
LENGTHS = (100, 10_000)


def measure(quick: bool, rounds: int) -> Iterator[Result | str]:
    if not dist.is_available():
        yield "this torch has no torch.distributed"
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        for count in COUNTS[: 1 if quick else None]:
            for length in LENGTHS[: 1 if quick else None]:
                yield compare(count, length, rounds)
    finally:
        dist.destroy_process_group()


def spread(grads: list[Tensor]) -> list[Tensor]:
    """Return the parameters of `parameters` and their gradients as DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    params: list[Tensor] = []
    for p, grad in zip(parameters(grads), grads, strict=True):
        params.append(torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
        params[-1].grad = distribute_tensor(grad, mesh, [Shard(0)])
    return params


def compare(count: int, length: int, rounds: int) -> Result:
    """Return the contenders: ours over plain tensors, and all over DTensors."""
    grads = gradients([(length,)] * count)
    plain = parameters(grads)
    makers = ADAMW.optimizers()
    runs: dict[str, Run] = {"onepass": makers["onepass"](plain).step}
    made = {"onepass": plain}
    for name, make in makers.items():
        params = spread(grads)
        made[f"{name}, DTensor"] = params
        runs[f"{name}, DTensor"] = make(params).step
    for name, params in made.items():
        for _ in range(CHECKED_STEPS):
            runs[name]()
        ADAMW.check(name, plain, [p.full_tensor() if hasattr(p, "full_tensor") else p for p in params])
    return Result(f"sharded: {count} x {length}", ADAMW.name, count * length, count, time_in_turn(runs, rounds))


if __name__ == "__main__":
    from run import alone

    alone(measure, __doc__)
