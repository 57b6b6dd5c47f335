"""What ``onepass.log_to`` costs: a step, and a whole training step, with a log over one without.

Both are run in turn from the same start, and every parameter is compared afterwards, to the bit. The writer is
TensorBoard's own, or none, which leaves the cost of the log itself. Each sample is a whole interval of ten steps, one
of which is written.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import onepass
import torch
from onepass.demo import digits
from torch import nn
from torch.utils.tensorboard import SummaryWriter

INTERVAL = 10


def mlp():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class NoWriter:
    """Takes the scalars and drops them: what remains is the cost of the log itself."""

    def add_scalar(self, tag, value, step):
        pass


class Many(nn.Module):
    """A thousand small tensors, each of which scales its input."""

    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList(torch.full((100,), 1.0 + i * 1e-6) for i in range(1000))

    def forward(self, x):
        for scale in self.scales:
            x = x * scale
        return x


def contenders():
    """Name -> how to make the model, and its input and target."""
    generator = torch.Generator().manual_seed(0)
    task = digits("adamw", quick=True)
    x, y = task.draw(generator)
    return {
        "digits convolutional net": (task.build, x, y),
        "MLP of 6 tensors": (mlp, torch.randn(64, 64, generator=generator), y),
        "1000 tensors of 100": (Many, torch.randn(64, 100, generator=generator), y),
        "one tensor of 4M": (
            lambda: nn.Linear(2048, 2048, bias=False),
            torch.randn(64, 2048, generator=generator),
            y,
        ),
    }


class Run:
    """A model in training, with a log or without."""

    def __init__(self, build, x, y, writer):
        torch.manual_seed(0)
        self.model, self.x, self.y = build(), x, y
        self.optimizer = onepass.AdamW(self.model.parameters(), lr=1e-3)
        self.loss()
        if writer:
            onepass.log_to(writer, self.optimizer, interval=INTERVAL)

    def loss(self):
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.x), self.y).backward()

    def seconds(self, whole):
        start = time.perf_counter()
        for _ in range(INTERVAL):
            if whole:
                self.loss()
            self.optimizer.step()
        return (time.perf_counter() - start) / INTERVAL


def measure(name, build, x, y, writer, rounds, whole):
    plain, logged = (Run(build, x, y, w) for w in (None, writer))
    pairs = [(plain.seconds(whole), logged.seconds(whole)) for _ in range(rounds + 1)][1:]
    for a, b in zip(plain.model.parameters(), logged.model.parameters(), strict=True):
        if not torch.equal(a, b):
            raise AssertionError(f"{name}: logging has changed a parameter")
    ratio = statistics.median(b / a for a, b in pairs)
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratio


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    print(
        f"AdamW, torch {torch.__version__}, {torch.get_num_threads()} threads; microseconds a step, interval {INTERVAL}"
    )
    print(f"{'':26}{'':15}{'writer':12}{'off':>10}{'on':>10}{'on/off':>9}")
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        for name, (build, x, y) in contenders().items():
            for whole in (True, False):
                what = "training step" if whole else "step alone"
                for kind, to in (("none", NoWriter()), ("TensorBoard", writer)):
                    off, on, ratio = measure(name, build, x, y, to, rounds, whole)
                    print(f"{name:26}{what:15}{kind:12}{off * 1e6:10.1f}{on * 1e6:10.1f}{ratio:9.3f}", flush=True)


if __name__ == "__main__":
    main()
