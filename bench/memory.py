"""Memory of the states: bytes, step time, and what training loses, by the dtype of the states.

``python bench/memory.py [--json FILE] [--quick] [--rounds N] [--trained FILE]``, twelve minutes with the peers. With
``--trained`` it takes what the trainings gave, which does not depend on the machine's load, from a file of the same
version, and needs three minutes. The contenders store the
states of AdamW, Lion, RMSprop and NAdam in float32, bfloat16 and 8 bits, beside masters or without. The peers are
torch, bitsandbytes and torchao (``pip install 'onepass[bench]'``).

- Bytes per parameter: of the states (masters included), and of parameter and states, counted in the tensors.
- ns/parameter: a step over 16 matrices of 4M elements. Contenders start from the same parameters, and after some steps
  with the same gradients no element may be further from the first contender's than that one has moved at most, and the
  mean distance may be at most half of the mean movement (but with bfloat16 parameters that have no masters).
  (The peers with few bits are not checked: torchao's AdamW8bit would not pass.)
- Loss: the character transformer of ``python -m onepass demo``, 300 steps at a constant learning rate, on held-out
  text, for several seeds. Its difference from the first contender's with the same seed is averaged over the seeds.
- Largest update: of any element in any step of any seed, in units of the learning rate. It shows what states of few
  bits do wrong: an average of squares that is rounded to 0 has huge updates. (Not for bfloat16 parameters, whose
  rounding is larger than an update.)
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peers
import report
import run
import torch
from onepass.cli.bench import as_json, line_of
from onepass.cli.demo import stdlib_text
from onepass.cli.timing import Result, check, gradients, parameters, time_in_turn
from torch import Tensor
from torch.optim import Optimizer

CHECKED_STEPS = 4
PEERS = ("bitsandbytes", "torchao")
SEEDS = (0, 1, 2)
STEPS = 300


class Contender(NamedTuple):
    """An optimizer's class, by ``module:class``, and its arguments."""

    constructor: str
    arguments: dict[str, Any]
    dtype: torch.dtype = torch.float32  # of the parameters

    def make(self, params: Iterable[Tensor], lr: float) -> Optimizer:
        module, _, name = self.constructor.partition(":")
        made: Callable[..., Optimizer] = getattr(importlib.import_module(module), name)
        return made(params, lr=lr, **self.arguments)

    @property
    def is_peer(self) -> bool:
        """Whether it is of a package that may be missing."""
        return not self.constructor.startswith(("onepass:", "torch."))

    @property
    def loses_updates(self) -> bool:
        """Whether it rounds its parameters to fewer bits than an update of 1e-3 has."""
        return self.dtype != torch.float32 and "master" not in self.arguments

    def missing(self) -> str | None:
        """Return why this contender cannot be used here. Raises if it is no peer."""
        p = torch.nn.Parameter(torch.zeros(64, 64, dtype=self.dtype))
        p.grad = torch.ones_like(p)
        try:
            self.make([p], 1e-3).step()
        except Exception as error:
            if not self.is_peer:
                raise
            return f"{type(error).__name__}: {error}"
        return None


LR = {"AdamW": 2e-3, "Lion": 3e-4, "RMSprop": 1e-3, "NAdam": 2e-3}
FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16


def contenders(optimizer: str) -> dict[str, Contender]:
    """Return the contenders by name. The first one is the reference."""
    ours = f"onepass:{optimizer}"
    found = {
        "onepass, float32": Contender(ours, {}),
        "onepass, bfloat16": Contender(ours, {"state_dtype": BF16}),
        "onepass, 8 bits": Contender(ours, {"state_dtype": FP8}),
    }
    if optimizer == "AdamW":
        found |= {
            "onepass, bfloat16 model, split masters": Contender(
                ours, {"master": "split", "state_dtype": torch.float32}, BF16
            ),
            "onepass, bfloat16 model, split masters, 8 bits": Contender(
                ours, {"master": "split", "state_dtype": FP8}, BF16
            ),
            "onepass, bfloat16 model": Contender(ours, {}, BF16),
            "onepass, bfloat16 model, stochastic rounding": Contender(ours, {"stochastic_rounding": True}, BF16),
            "onepass, bfloat16 model, stochastic rounding, 8 bits": Contender(
                ours, {"stochastic_rounding": True, "state_dtype": FP8}, BF16
            ),
            "torch, fused": Contender("torch.optim:AdamW", {"fused": True}),
        }
    elif hasattr(torch.optim, optimizer):
        found["torch, foreach"] = Contender(f"torch.optim:{optimizer}", {"foreach": True})
    if optimizer != "NAdam":
        found["bitsandbytes, 8 bits"] = Contender(f"bitsandbytes.optim:{optimizer}8bit", {})
    if optimizer == "AdamW":
        found["torchao, 8 bits"] = Contender("torchao.optim:AdamW8bit", {})
        found["torchao, float8"] = Contender("torchao.optim:AdamWFp8", {})
    return found


class Trained(NamedTuple):
    """What a training gave."""

    loss: float
    largest_update: float | None  # in units of lr


def train(contender: Contender, lr: float, seed: int, quick: bool) -> Trained:
    """Train the character transformer."""
    task = stdlib_text("adamw", quick)
    torch.manual_seed(seed)
    model = task.build().to(contender.dtype)
    params = list(model.parameters())
    optimizer = contender.make(params, lr)
    batches = torch.Generator().manual_seed(seed)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(model(inputs).flatten(0, -2).float(), targets.flatten())

    largest = 0.0
    for _ in range(10 if quick else STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(*task.draw(batches)))
        before = [p.detach().clone() for p in params]
        optimizer.step()
        moved = torch._foreach_sub([p.detach() for p in params], before)
        largest = max(largest, *(float(m.abs().max()) for m in moved))
    with torch.no_grad():
        loss = float(loss_of(*task.held_out))
    return Trained(loss, largest / lr if contender.dtype == torch.float32 else None)


def nbytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, and of the tensors in a tensor subclass."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def state_bytes(optimizer: Optimizer) -> int:
    return sum(nbytes(x) for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))


def distances(params: list[Tensor], others: list[Tensor]) -> Iterator[Tensor]:
    return ((p.detach() - q.detach()).abs() for p, q in zip(params, others, strict=True))


def mean(tensors: Iterable[Tensor]) -> float:
    return statistics.mean(float(x.mean()) for x in tensors)


def time(optimizer: str, usable: dict[str, Contender], quick: bool, rounds: int) -> tuple[Result, dict[str, float]]:
    """Return the step times, and the bytes of states per parameter by contender."""
    lr = 1e-3
    rows = 16 if quick else 4096
    shapes = [(rows, 1024)] * 16
    elements = 16 * rows * 1024
    grads = {dtype: gradients(shapes, dtype) for dtype in dict.fromkeys(c.dtype for c in usable.values())}
    starts = parameters(grads[torch.float32])
    made, of_states = {}, {}
    reference: list[Tensor] = []
    for name, contender in usable.items():
        params: list[Tensor] = [torch.nn.Parameter(p.detach().to(contender.dtype, copy=True)) for p in starts]
        for p, grad in zip(params, grads[contender.dtype], strict=True):
            p.grad = grad
        made[name] = contender.make(params, lr)
        for _ in range(CHECKED_STEPS):
            made[name].step()
        reference = reference or params
        if not contender.is_peer:
            farthest = max(float(moved.max()) for moved in distances(reference, starts))
            # Parameters in bfloat16 also started with the rounding that `check` allows.
            wanted = [p.to(contender.dtype) for p in reference]
            check(f"{optimizer}, {name}", params, wanted, tolerance=farthest)
            apart, moved = (mean(distances(reference, others)) for others in (params, starts))
            if apart > moved / 2 and not contender.loses_updates:
                raise AssertionError(
                    f"{optimizer}, {name}: {apart:.2g} from the first on average; that moved {moved:.2g}"
                )
        of_states[name] = state_bytes(made[name]) / elements
    samples = time_in_turn({name: o.step for name, o in made.items()}, rounds)
    return Result(f"memory: {optimizer}", optimizer, elements, len(shapes), samples, question="memory"), of_states


Rows = dict[tuple[str, str], dict[str, Any]]  # by optimizer and contender


def measure(
    quick: bool, rounds: int, missing: dict[str, str], earlier: Rows
) -> Iterator[tuple[Result, list[dict[str, Any]]]]:
    """Yield for each optimizer the step times, and a row for each contender. Those in ``earlier`` are not trained."""
    for optimizer in LR:
        usable = {}
        for name, contender in contenders(optimizer).items():
            if why := contender.missing():
                missing[f"{optimizer}, {name}"] = why
            else:
                usable[name] = contender
        result, of_states = time(optimizer, usable, quick, rounds)
        if all((optimizer, name) in earlier for name in usable):
            told = {name: earlier[optimizer, name] for name in usable}
        else:
            trained = {name: [train(c, LR[optimizer], seed, quick) for seed in SEEDS] for name, c in usable.items()}
            told = {name: training_of(name, trained) for name in usable}
        rows = []
        for name, contender in usable.items():
            step = {
                "optimizer": optimizer,
                "contender": name,
                "bytes of states": round(of_states[name], 3),
                "bytes with parameter": round(of_states[name] + contender.dtype.itemsize, 3),
                "ns/parameter": float(f"{result.seconds(name) / result.elements * 1e9:.3g}"),
            }
            rows.append({**told[name], **step})
        yield result, rows


def training_of(name: str, trained: dict[str, list[Trained]]) -> dict[str, Any]:
    """Return what the trainings of one contender gave, compared with the first contender's."""
    own, first = trained[name], next(iter(trained.values()))
    apart = [a.loss / b.loss - 1 for a, b in zip(own, first, strict=True)]
    updates = [seen.largest_update for seen in own if seen.largest_update is not None]
    return {
        "losses": [round(seen.loss, 4) for seen in own],
        "loss apart": round(statistics.mean(apart), 5),
        "largest update": round(max(updates), 1) if updates else None,
    }


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--trained", type=Path, metavar="FILE", help="take what the trainings gave from this file")
    run.add_options(parser)
    args = parser.parse_args()
    told = json.loads(args.trained.read_text())["states"] if args.trained else []
    run.begin(args)
    missing: dict[str, str] = {}
    results: list[Result] = []
    rows: list[dict[str, Any]] = []
    earlier = {(row["optimizer"], row["contender"]): row for row in told}
    for result, found in measure(args.quick, run.rounds_of(args), missing, earlier):
        print(line_of(result), flush=True)
        print(*found, sep="\n", flush=True)
        results.append(result)
        rows += found
        if args.json:
            versions = {peer: version for peer, version in peers.versions().items() if peer in PEERS}
            more = {"quick": args.quick, "missing": missing, "peers": versions, "states": rows}
            args.json.write_text(as_json(results, run.rounds_of(args), **more))
    print(report.states_table({"states": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
