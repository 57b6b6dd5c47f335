"""Batches: gradient descent with all samples per step, with 32, or with one, fitting a line by least squares.

The update and the learning rate are the same; only the gradient differs. With fewer samples it is cheaper and noisier:
there are more steps per epoch, and at the end the parameters fluctuate around the minimum instead of reaching it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import onepass
import torch
from onepass.examples.common import CYCLE, INK, Gallery, Numbers, alone, label
from torch import Tensor

SAMPLES, SLOPE, INTERCEPT, NOISE = 512, 2.0, -1.0, 0.5
SIZES = {"all": SAMPLES, "32": 32, "1": 1}
LR, EPOCHS = 0.05, 20


@dataclass
class Fit:
    """Slope and intercept before each step and after the last, with the loss over all samples and the time so far."""

    batch: int
    at: Numbers  # of shape (steps + 1, 2)
    loss: Numbers
    seconds: Numbers

    @property
    def epochs(self) -> Numbers:
        return np.arange(len(self.loss)) * self.batch / SAMPLES


def data() -> tuple[Tensor, Tensor]:
    """Return the inputs as rows (x, 1), and the targets."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
    y = SLOPE * x + INTERCEPT + NOISE * torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
    return torch.stack([x, torch.ones_like(x)], 1), y


def loss_of(inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return ((inputs @ weights - targets) ** 2).mean() / 2


def fit(batch: int, epochs: int) -> Fit:
    inputs, targets = data()
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = onepass.SGD([weights], lr=LR)
    generator = torch.Generator().manual_seed(1)
    at, seconds = [weights.detach().clone()], [0.0]
    for _ in range(epochs):
        for rows in torch.randperm(SAMPLES, generator=generator).split(batch):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss_of(inputs[rows], targets[rows], weights).backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            at.append(weights.detach().clone())
    path = torch.stack(at)
    losses = ((path @ inputs.T - targets) ** 2).mean(1) / 2
    return Fit(batch, path.numpy(), losses.numpy(), np.cumsum(seconds))


def best() -> tuple[Numbers, float]:
    """Return the least-squares solution and its loss."""
    inputs, targets = data()
    weights = torch.linalg.lstsq(inputs, targets).solution
    return weights.numpy(), loss_of(inputs, targets, weights).item()


def run(gallery: Gallery) -> None:
    fit(SAMPLES, 1)  # so that the costs of a first step are not part of the times below
    fits = {name: fit(batch, 2 if gallery.quick else EPOCHS) for name, batch in gallery.track(SIZES.items(), "fits")}
    solution, least = best()
    gallery.table(
        ["samples in a batch", "steps", "excess loss, 1 epoch", "at the end", "jitter of the end", "seconds"],
        (
            [name, len(f.loss) - 1, f.loss[SAMPLES // f.batch] - least, f.loss[-1] - least, jitter(f), f.seconds[-1]]
            for name, f in fits.items()
        ),
    )

    with gallery.picture("batch_sizes_paths", 9, 3.4) as figure:
        slopes, intercepts = np.linspace(-0.4, 2.6, 80), np.linspace(-1.6, 0.4, 80)
        inputs, targets = (t.numpy() for t in data())
        grid = np.stack(np.meshgrid(slopes, intercepts), -1)
        surface = ((grid @ inputs.T - targets) ** 2).mean(-1) / 2
        for axes, (name, f), color in zip(figure.subplots(1, 3, sharey=True), fits.items(), CYCLE, strict=False):
            axes.contour(slopes, intercepts, surface, 14, cmap="Greys", alpha=0.5)
            axes.plot(*f.at.T, ".-", color=color, linewidth=0.8, markersize=2)
            axes.plot(*solution, "*", color=INK, markersize=10)
            label(axes, f"{name}: {len(f.loss) - 1:,} steps", "slope", "intercept")
            axes.grid(False)

    with gallery.picture("batch_sizes_losses", 9, 3.6) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for (name, f), color in reversed([*zip(fits.items(), CYCLE, strict=False)]):
            line = {"color": color, "linewidth": 0.9, "label": f"batches of {name}"}
            left.semilogy(f.epochs, f.loss - least, **line)
            right.loglog(1e3 * f.seconds[1:], (f.loss - least)[1:], **line)
        label(left, "Per epoch", "epochs", "loss above the least")
        label(right, "Per second", "milliseconds of training", "")
        left.legend()


def jitter(f: Fit) -> float:
    """Return the standard deviation of the last quarter of the path around its mean."""
    return float(np.sqrt(f.at[-len(f.at) // 4 :].var(0).sum()))


if __name__ == "__main__":
    alone(run)
