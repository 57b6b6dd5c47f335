"""Training a GPT on a GPU with onepass and torch's two forms of AdamW: losses, and the optimizer's share of a step."""

from __future__ import annotations

import copy
import functools
import gc
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import onepass
import torch
from gpu_device import Device
from onepass.cli.demo import Block
from onepass.cli.timing import Result
from onepass.training.table import table_line
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

STEPS = 30
WARM_UP = 10  # the steps before them are not timed

# Training in bfloat16 is chaotic, and on a GPU some sums have no fixed order. torch's two forms of AdamW differ by
# rounding alone, so the difference between their losses is what rounding explains: ours may be FACTOR times as far from
# the fused form. NATS is for the case that torch's two forms happen to be close. With a model of 4 layers on a CPU,
# torch's two forms were 2e-4 nats apart, and a learning rate of 1 % more or a beta1 of 0.89 changed the loss by 0.016
# and 0.010.
FACTOR, NATS = 5.0, 0.005

NAME = "training: GPT-2"


class Size(NamedTuple):
    """The size of the model and of a batch."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    context: int
    batch: int


FULL = Size(layers=12, width=768, heads=12, vocabulary=50_304, context=1024, batch=8)
QUICK = Size(layers=2, width=32, heads=2, vocabulary=256, context=32, batch=4)


class GPT(nn.Module):
    """A model with the layers of GPT-2 (Radford et al. 2019), without dropout."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Parameter(torch.empty(size.context, size.width))
        self.layers = nn.Sequential(*(Block(size.width, size.heads) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, text: Tensor, following: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats; both tensors have the shape (batch, context)."""
        x = self.norm(self.layers(self.tokens(text) + self.positions))
        logits = functional.linear(x, self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), following.flatten())


class Run(NamedTuple):
    """The training by one optimizer.

    Attributes:
        losses: The loss of each step, on the device.
        whole: The seconds of each timed step.
        part: The seconds of the optimizer's part of them.
    """

    model: GPT
    optimizer: Optimizer
    losses: list[Tensor]
    whole: list[float]
    part: list[float]

    def step(self, text: Tensor, following: Tensor, device: Device) -> Callable[[], None]:
        """Make a training step. Return a function that waits for it and records its times."""
        start = device.now()
        self.optimizer.zero_grad()
        with torch.autocast(device.torch.type, torch.bfloat16):
            loss = self.model(text, following)
        loss.backward()
        before = device.now()
        self.optimizer.step()
        end = device.now()
        self.losses.append(loss.detach())

        def record() -> None:
            self.whole.append(device.between(start, end))
            self.part.append(device.between(before, end))

        return record


class Training(NamedTuple):
    """The result: times by the device's clock, ours first, and the loss of each step in nats."""

    whole: Result
    part: Result
    losses: dict[str, list[float]]

    def results(self) -> list[Result]:
        """Return the results for the file."""
        return [self.whole, self.part]

    def lines(self) -> Iterator[str]:
        """Return a line per contender: the whole step, the optimizer's part, its share, and the last loss."""
        ratios, parts = ({r.first: 1.0, **r.ratios()} for r in (self.whole, self.part))
        for name, losses in self.losses.items():
            whole, part = self.whole.seconds(name), self.part.seconds(name)
            step = f"step {whole * 1e3:.2f} ms ({ratios[name]:.3f}x)"
            own = f"optimizer {part * 1e3:.3f} ms ({parts[name]:.2f}x), {part / whole:.1%}"
            loss = f"loss {losses[0]:.4f} to {losses[-1]:.4f}"
            yield table_line([NAME, "AdamW", name, f"{step}, {own}, {loss}"], ("<26", "<9", "<18", "<"))


def train(size: Size, device: Device, steps: int = STEPS) -> Training:
    """Train all contenders, in turn on each batch.

    Raises:
        AssertionError: The losses differ by more than rounding explains, or kernels have not stepped our parameters.
    """
    torch.manual_seed(0)
    with device.torch:
        model = GPT(size)
    classes: dict[str, Callable[..., Optimizer]] = {
        "onepass": onepass.AdamW,
        "foreach": functools.partial(torch.optim.AdamW, foreach=True),  # torch's default on a GPU
        "fused": functools.partial(torch.optim.AdamW, fused=True),
    }
    runs = {}
    for name, make in classes.items():
        own = copy.deepcopy(model)
        runs[name] = Run(own, make(own.parameters(), lr=3e-4), [], [], [])
    tensors, elements = len(list(model.parameters())), sum(p.numel() for p in model.parameters())

    stepped = -device.kernel_steps()
    batches = draw(size, steps)
    order = list(runs)
    records: list[Callable[[], None]] = []
    gc.collect()
    gc.disable()
    try:
        for step, (text, following) in enumerate(batches.to(device.torch)):
            # In changing order, so that other load affects all alike.
            recorded = [runs[name].step(text, following, device) for name in order]
            records += recorded if step >= min(WARM_UP, steps // 3) else []
            order.append(order.pop(0))
        for record in records:
            record()
    finally:
        gc.enable()
    stepped += device.kernel_steps()
    if stepped != steps * tensors:
        raise AssertionError(f"{NAME}: kernels stepped {stepped} of {steps * tensors} tensors")
    losses = {name: torch.stack(run.losses).tolist() for name, run in runs.items()}
    check(losses)

    def result(what: str, of: Callable[[Run], list[float]]) -> Result:
        samples = {name: of(run) for name, run in runs.items()}
        return Result(f"{NAME}, {what}", "AdamW", elements, tensors, samples, question="device time")

    return Training(
        result("whole step", lambda run: run.whole), result("optimizer's part", lambda run: run.part), losses
    )


def draw(size: Size, steps: int) -> Tensor:
    """Return text of Python's standard library as bytes, and each byte's successor: (steps, 2, batch, context)."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:100]
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(text) - size.context, (steps, size.batch, 1), generator=generator)
    windows = text[starts + torch.arange(size.context + 1)]
    return torch.stack([windows[..., :-1], windows[..., 1:]], dim=1)


def check(losses: dict[str, list[float]]) -> None:
    """Compare the losses of all steps.

    Raises:
        AssertionError: Ours differ by more than rounding explains, or are not finite.
    """
    ours, foreach, fused = (torch.tensor(losses[name]) for name in ("onepass", "foreach", "fused"))
    apart, allowed = (ours - fused).abs().max(), FACTOR * (foreach - fused).abs().max()
    if not apart <= max(allowed, torch.tensor(NATS)):  # a NaN is not
        raise AssertionError(f"{NAME}: losses differ by {apart:.2e} nats, and torch's by {allowed / FACTOR:.2e}")
