"""Momentum: an exponentially weighted average of the gradients, and its effect at a small and a larger learning rate.

With dampening equal to the momentum b, SGD's buffer is an average of the gradients in which the gradient of k steps ago
has the weight (1 - b) b^k: it averages over some 1 / (1 - b) steps. Without dampening, as usual, all weights are
1 / (1 - b) times as large, and so are the steps when the gradients agree.
"""

from __future__ import annotations

import numpy as np
import onepass
from onepass.examples import learning_rate
from onepass.examples.common import CYCLE, GREY, Gallery, Numbers, alone, label, leaf

BETAS = (0.98, 0.95, 0.9, 0.8)
AGES = 100
RATES, MOMENTA = (0.01, 0.03), (0.0, 0.9, 0.63)
STEPS = 50


def average(beta: float, gradients: Numbers) -> Numbers:
    """Return SGD's momentum buffer after each of these gradients of one parameter."""
    x = leaf(0.0)
    optimizer = onepass.SGD([x], lr=0.0, momentum=beta, dampening=beta)
    buffers = []
    # The first gradient initializes the buffer without dampening, so it is zero here.
    for gradient in (0.0, *gradients):
        x.grad = x.new_tensor([gradient])
        optimizer.step()
        buffers.append(optimizer.state[x]["momentum_buffer"].item())
    return np.array(buffers[1:])


def weights(beta: float) -> Numbers:
    """Return the weight of a gradient in the buffer 0, 1, ... steps later: the buffer after an impulse."""
    return average(beta, np.eye(1, AGES)[0])


def descend(lr: float, momentum: float, steps: int = STEPS) -> Numbers:
    """Return x after each step of gradient descent on y = 4 x^2."""
    return learning_rate.descend(lr, steps, momentum).x


def run(gallery: Gallery) -> None:
    gallery.table(
        ["b", "weight now", "10 steps ago", "50 steps ago", "sum of 100", "1 / (1 - b)"],
        ([b, *weights(b)[[0, 10, 50]], weights(b).sum(), 1 / (1 - b)] for b in BETAS),
    )
    with gallery.picture("momentum_weights", 9, 3.8) as figure:
        left, right = figure.subplots(1, 2)
        for beta in BETAS:
            left.plot(weights(beta), label=f"b = {beta:g}, remembers {1 / (1 - beta):.0f}")
        label(left, "Weight of a gradient in the average, (1 - b) bᵏ", "steps since, k", "weight")
        left.legend()
        t = np.arange(200)
        samples = np.sin(t / 25) + np.random.default_rng(0).normal(0, 0.4, len(t))
        right.plot(t, samples, ".", color=GREY, markersize=3, label="gradients")
        for beta in BETAS:
            right.plot(t, average(beta, samples), label=f"b = {beta:g}")
        label(right, "Noisy gradients, and their averages", "step", "gradient")
        right.legend(ncols=2)

    paths = {(lr, m): descend(lr, m) for lr in RATES for m in MOMENTA}
    slow, fast = np.abs(paths[0.01, 0.63]), np.abs(paths[0.03, 0.0])
    ahead = np.flatnonzero(slow < fast)
    gallery.print()
    gallery.table(
        ["lr, momentum", "|x| after 8", "after 10", "after 50"],
        ([f"{lr:g}, {m:g}", *np.abs(path[[8, 10, 50]])] for (lr, m), path in paths.items()),
    )
    gallery.print(f"lr 0.01 with momentum 0.63 overtakes lr 0.03 without at step {ahead[0]}")
    with gallery.picture("momentum_rates", 9, 3.8) as figure:
        for axes, momenta in zip(figure.subplots(1, 2), ((0.0, 0.9), (0.0, 0.63)), strict=True):
            for lr, color in zip(RATES, CYCLE, strict=False):
                for m in momenta:
                    style = "-" if m else ":"
                    axes.plot(paths[lr, m] ** 2 * 4, style, color=color, label=f"lr {lr:g}, momentum {m:g}")
            axes.set_xlim(0, 40)
            label(axes, f"y = 4 x² with and without momentum {momenta[1]:g}", "iteration", "loss y")
            axes.legend(loc="upper right")
        axes.set_yscale("log")
        axes.set_ylim(1e-6, 30)
        place = ahead[0], 4 * slow[ahead[0]] ** 2
        axes.annotate("overtakes", place, (4, 1e-3), arrowprops={"arrowstyle": "->", "color": GREY})


if __name__ == "__main__":
    alone(run)
