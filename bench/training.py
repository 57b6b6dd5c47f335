"""Whole training steps of real models, and the optimizer's share of their time.

``python bench/training.py [--quick] [--rounds N]``. Two results per model: the whole step (forward, backward, the
optimizer's step, zero_grad), and the optimizer's part of the same steps. Every contender has its own model, with the
same start and the same batches. The models: the convolutional net on handwritten digits and the character transformer
of ``python -m onepass demo``; a policy of reinforcement learning with two hidden layers of 64; and a wide embedding
with sparse gradients, which SparseAdam steps (torch has only one form of it), while the contender's AdamW steps the
dense part.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import onepass
import torch
from onepass.cli.demo import CharTransformer, digits, stdlib_text
from onepass.cli.timing import SAMPLE, Result, Samples, check, sample_in_turn
from torch import Tensor, nn
from torch.optim import Optimizer

LR = 1e-3
CHECKED_STEPS = 4
BATCHES = 16  # drawn before the first step, and used repeatedly

Make = Callable[..., Optimizer]
Batch = tuple[Tensor, Tensor]

# The classes of each contender, for dense and for sparse gradients, and the arguments of the dense one.
CONTENDERS: dict[str, tuple[Make, Make, dict[str, Any]]] = {
    "onepass": (onepass.AdamW, onepass.SparseAdam, {}),
    "default": (torch.optim.AdamW, torch.optim.SparseAdam, {"foreach": False, "fused": False}),
    "foreach": (torch.optim.AdamW, torch.optim.SparseAdam, {"foreach": True}),
    "fused": (torch.optim.AdamW, torch.optim.SparseAdam, {"fused": True}),
}


class Workload(NamedTuple):
    """A model, its batches, and its loss."""

    build: Callable[[], nn.Module]
    batches: Sequence[Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    undecided: str = "-"  # part of the names of parameters whose gradients are rounding only: see `agree`


class WideEmbedding(nn.Module):
    """A perceptron on the mean of some rows of a large embedding."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 64, sparse=True)
        self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, index: Tensor) -> Tensor:
        output: Tensor = self.head(self.table(index).mean(1))
        return output


def of_classes(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, -2), target.flatten())


def policy() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))


def chosen_action(values: Tensor, target: Tensor) -> Tensor:
    """Return the loss of Q-learning, for the value of the action taken."""
    return nn.functional.smooth_l1_loss(values[:, 0], target)


def workloads(quick: bool) -> Iterator[tuple[str, Workload]]:
    """Yield the models by name, with how to train them."""
    generator = torch.Generator().manual_seed(0)

    def batches(draw: Callable[[torch.Generator], Batch]) -> list[Batch]:
        return [draw(generator) for _ in range(BATCHES)]

    task = digits("adamw", quick)
    yield "digits net", Workload(task.build, batches(task.draw), of_classes)

    text = stdlib_text("adamw", quick)
    build = (lambda: CharTransformer(64, width=32, layers=1)) if quick else text.build
    yield "character transformer", Workload(build, batches(text.draw), of_classes, undecided="qkv.bias")

    seen = batches(lambda g: (torch.randn(64, 8, generator=g), torch.randn(64, generator=g)))
    yield "RL policy", Workload(policy, seen, chosen_action)

    rows = 10_000 if quick else 1_000_000
    # A few words are frequent and most are rare: indices are spread evenly over their logarithm.
    words = batches(
        lambda g: (
            (rows ** torch.rand(256, 16, generator=g)).long().clamp(max=rows - 1),
            torch.randint(10, (256,), generator=g),
        )
    )
    yield "wide embedding", Workload(lambda: WideEmbedding(rows), words, of_classes)


class Training:
    """One contender: a model, its optimizers, and its position in the batches."""

    def __init__(self, workload: Workload, contender: str) -> None:
        torch.manual_seed(0)
        self.model, self.loss = workload.build(), workload.loss
        self.batches = itertools.cycle(workload.batches)
        dense_class, sparse_class, arguments = CONTENDERS[contender]
        sparse = [m.weight for m in self.model.modules() if isinstance(m, nn.Embedding) and m.sparse]
        dense = [p for p in self.model.parameters() if all(p is not s for s in sparse)]
        self.optimizers = [dense_class(dense, lr=LR, **arguments)]
        if sparse:
            self.optimizers.append(sparse_class(sparse, lr=LR))

    def step(self) -> float:
        """Make a training step and return the seconds of the optimizer's part."""
        inputs, targets = next(self.batches)
        self.loss(self.model(inputs), targets).backward()
        start = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.step()
        seconds = time.perf_counter() - start
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return seconds

    def agree(self, name: str, first: Training, undecided: str) -> None:
        """Compare every element with the first contender's, after CHECKED_STEPS steps.

        Differences in rounding enter the gradients of the next steps. Measured differences are within the units of
        rounding that `check` allows, with one exception: attention does not depend on the keys' bias, so its gradients
        are rounding errors of some 1e-10, and Adam divides by their size plus 1e-8. torch's own forms differ by 1.4e-5
        there after four steps. 5 % of a step is allowed.
        """
        for (key, ours), theirs in zip(first.model.named_parameters(), self.model.parameters(), strict=True):
            check(f"{name}: {key}", [ours], [theirs], tolerance=0.05 * LR if undecided in key else 1e-6)

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())


def compare(name: str, workload: Workload, rounds: int) -> tuple[Result, Result]:
    """Return the times of whole steps, and of the optimizers' part of them."""
    runs = {contender: Training(workload, contender) for contender in CONTENDERS}
    for run in runs.values():
        for _ in range(CHECKED_STEPS):
            run.step()
    for contender, run in runs.items():
        run.agree(f"{name}: {contender}", runs["onepass"], workload.undecided)

    start = time.perf_counter()
    for run in runs.values():
        run.step()
    repeats = max(1, round(SAMPLE * len(runs) / (time.perf_counter() - start)))
    parts: Samples = {contender: [] for contender in runs}

    def sample(contender: str) -> float:
        step = runs[contender].step
        start = time.perf_counter()
        parts[contender].append(sum(step() for _ in range(repeats)) / repeats)
        return (time.perf_counter() - start) / repeats

    whole = sample_in_turn(runs, rounds, sample)
    params = runs["onepass"].params
    optimizer = type(runs["onepass"].optimizers[-1]).__name__  # the sparse one, if there are two
    elements = sum(map(Tensor.numel, params))

    def result(what: str, samples: Samples) -> Result:
        return Result(f"training: {name}, {what}", optimizer, elements, len(params), samples)

    return result("whole step", whole), result("optimizer's part", parts)


def measure(quick: bool, rounds: int) -> Iterator[Result]:
    """Yield two results per model."""
    for name, workload in workloads(quick):
        yield from compare(name, workload, rounds)


if __name__ == "__main__":
    from run import alone

    alone(measure, __doc__)
