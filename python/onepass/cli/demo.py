"""``python -m onepass demo``: train two small models on real data, with torch.optim and with onepass, and compare.

One task is a convolutional net on scikit-learn's handwritten digits, the other a character-level transformer on the
source text of Python's standard library. Each model is trained three times side by side, from the same start and on the
same batches: with ``torch.optim``, with ``torch.optim`` and ``fused=True``, and with ``onepass``.

torch's two forms of the same optimizer differ by rounding alone. Training is chaotic: a difference in the last bit
grows from step to step. So the distance between torch's two forms shows how far apart correct implementations end up,
and the distance of onepass is compared with it.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import __version__
from ..optimizers.adam import Adam
from ..optimizers.adamw import AdamW
from ..optimizers.sgd import SGD
from ..training.catalog import plain_name
from ..training.progress import Bar
from ..training.table import text_table
from .info import facts

# torch's class and ours, and their arguments in addition to the learning rate.
CLASSES: dict[str, tuple[Callable[..., Optimizer], Callable[..., Optimizer]]] = {
    "sgd": (torch.optim.SGD, SGD),
    "adam": (torch.optim.Adam, Adam),
    "adamw": (torch.optim.AdamW, AdamW),
}
ARGUMENTS: dict[str, dict[str, float]] = {"sgd": {"momentum": 0.9}, "adam": {}, "adamw": {"weight_decay": 0.1}}

# Criteria for two runs to agree. Parameters are compared after the first CHECK steps, while their distance is still due
# to rounding: at most ten times the distance between torch's two forms, or 1e-4 of the distance from the start. (Ten
# small steps in float32 end 1e-5 to 3e-5 from the same steps in float64. Over seeds and optimizers the distance was 0
# to 5e-5; for an AdamW without weight decay, or with a wrong beta, epsilon or bias correction, 3e-3 and more.) Later
# the distance grows in jumps, whenever some unit flips, up to 5 % between torch's two forms. So at the end only the
# losses are compared, to within 3 % or 0.01 nats.
CHECK, APART_FACTOR, APART_RELATIVE, LOSS_RELATIVE, LOSS_NATS = 10, 10.0, 1e-4, 0.03, 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m onepass demo`` to the parser."""
    parser.add_argument(
        "--out", type=Path, default=Path("demo-results"), metavar="DIR", help="folder; default: demo-results"
    )
    parser.add_argument("--optimizer", type=plain_name, choices=sorted(CLASSES), default="adamw", help="default: adamw")
    parser.add_argument("--seed", type=int, default=0, help="seed of initial parameters and batches; default: 0")
    parser.add_argument("--threads", type=int, help="number of CPU threads; default: torch's")
    parser.add_argument("--quick", action="store_true", help="run a few steps only, which learn little")


# ---- The tasks ----


class Block(nn.Module):
    """A transformer layer: attention, then a perceptron, each on a normalized input and added to its input.

    Attention has the given bias or, without one, is causal.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return a tensor of the same shape (batch, context, width)."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(x)
        return out


class CharTransformer(nn.Module):
    """A causal transformer that predicts the next of 128 ASCII characters at every position."""

    bias: Tensor

    def __init__(self, context: int, width: int = 96, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.characters = nn.Embedding(128, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 128)
        # Positions are encoded by ALiBi (Press et al. 2022): scores decrease with the distance, with a slope for each
        # head. In a minute of training it learns far more than learned positions do.
        distance = torch.arange(context).unsqueeze(1) - torch.arange(context)
        slopes = 2.0 * 0.25 ** torch.arange(heads).view(-1, 1, 1)
        self.register_buffer("bias", torch.where(distance < 0, -torch.inf, -slopes * distance))

    def forward(self, text: Tensor) -> Tensor:
        """Return logits (batch, context, 128) for text (batch, context)."""
        x = self.characters(text)
        for layer in self.layers:
            x = layer(x, self.bias)
        logits: Tensor = self.head(self.norm(x))
        return logits


@dataclass
class Task:
    """A model to train, its batches, and the data held out from training."""

    name: str
    build: Callable[[], nn.Module]
    lr: float
    steps: int
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]
    untaught: float  # the held-out loss in nats of predicting each class by its frequency alone


def digits(optimizer: str, quick: bool) -> Task:
    """Return the task of handwritten digits: 1797 grey images of 8 x 8 pixels, a quarter of them held out."""
    # Imported here because it is an extra, and by name because it has no types.
    data = importlib.import_module("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 4], order[len(order) // 4 :]

    def build() -> nn.Module:
        convolutions = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
        return nn.Sequential(
            *convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = train[torch.randint(len(train), (64,), generator=generator)]
        return images[rows], labels[rows]

    lr, steps = 0.05 if optimizer == "sgd" else 2e-3, 20 if quick else 400
    held_out = images[test], labels[test]
    return Task("digits", build, lr, steps, draw, held_out, frequency_loss(labels[train], labels[test]))


def stdlib_text(optimizer: str, quick: bool) -> Task:
    """Return the task of text: the standard library (without packages) by characters, every tenth file held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if len(files) < 10:
        raise FileNotFoundError("the demo reads the standard library's .py files, which this Python does not have")
    context, batch = 64, 8

    def read(paths: list[Path]) -> Tensor:
        text = "".join(path.read_text("utf-8", "replace") for path in paths)
        return torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()

    test, train = read(files[::10]), read([path for i, path in enumerate(files) if i % 10])

    def windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        characters = text[starts.unsqueeze(1) + torch.arange(context + 1)]
        return characters[:, :-1], characters[:, 1:]

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return windows(train, torch.randint(len(train) - context, (batch,), generator=generator))

    lr, steps = 0.1 if optimizer == "sgd" else 5e-3, 10 if quick else 600
    held_out = windows(test, torch.arange(512) * (len(test) - context) // 512)
    return Task("text", lambda: CharTransformer(context), lr, steps, draw, held_out, frequency_loss(train, test))


def frequency_loss(train: Tensor, test: Tensor) -> float:
    """Return the loss on `test`, in nats, of predicting each class by its frequency in `train`."""
    counts = torch.bincount(train, minlength=128).double() + 1e-3
    return float(-(counts / counts.sum()).log()[test].mean())


# ---- Training ----


@dataclass
class Curves:
    """The record of one run: times in seconds, losses in nats, and the distance from the first run.

    The times exclude the drawing of batches, which the runs share. Distances are relative to the distance of the first
    run's parameters from their start (Euclidean norms). `apart_max` is the largest difference of an element.
    """

    label: str
    forward_backward: float = 0.0
    step: float = 0.0
    other: float = 0.0
    losses: list[float] = field(default_factory=list)
    apart_steps: list[int] = field(default_factory=list)
    apart_relative: list[float] = field(default_factory=list)
    apart_max: float = 0.0
    final_loss: float = 0.0
    held_out_loss: float = 0.0
    accuracy: float = 0.0

    @property
    def seconds(self) -> float:
        """Total time of this run."""
        return self.forward_backward + self.step + self.other


class Run:
    """One of the compared runs: a model, its optimizer, and their record."""

    def __init__(self, label: str, model: nn.Module, optimizer: Optimizer, steps: int) -> None:
        self.model, self.optimizer, self.seen = model, optimizer, Curves(label)
        # torch's scheduler also works with onepass: nothing else in the training loop changes.
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, optimizer.defaults["lr"], total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
        )

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats, over images or over every position of every text."""
        return nn.functional.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())

    def train(self, inputs: Tensor, targets: Tensor) -> None:
        """Make one training step and record its loss and times."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        cleared = time.perf_counter()
        loss = self.loss(inputs, targets)
        torch.autograd.backward(loss)
        differentiated = time.perf_counter()
        self.optimizer.step()
        stepped = time.perf_counter()
        self.schedule.step()
        self.seen.losses.append(loss.item())
        self.seen.forward_backward += differentiated - cleared
        self.seen.step += stepped - differentiated
        self.seen.other += time.perf_counter() - stepped + cleared - start

    @torch.no_grad()
    def vector(self) -> Tensor:
        """Return all parameters as one vector."""
        return nn.utils.parameters_to_vector(self.model.parameters())

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> None:
        """Record the final losses and the accuracy on held-out data."""
        last = self.seen.losses[-20:]
        self.seen.final_loss = sum(last) / len(last)
        self.seen.held_out_loss = self.loss(inputs, targets).item()
        self.seen.accuracy = (self.model(inputs).argmax(-1) == targets).float().mean().item()


def make_runs(task: Task, optimizer: str, model: nn.Module) -> list[Run]:
    """Return the runs, each with its own copy of `model`: torch's default first, onepass last."""
    theirs, ours = CLASSES[optimizer]
    runs = []
    for label, make, extra in (
        ("torch", theirs, {}),
        ("torch, fused=True", theirs, {"fused": True}),
        ("onepass", ours, {}),
    ):
        own = copy.deepcopy(model)
        arguments: dict[str, Any] = {"lr": task.lr, **ARGUMENTS[optimizer], **extra}
        runs.append(Run(label, own, make(own.parameters(), **arguments), task.steps))
    return runs


def compare(task: Task, optimizer: str, seed: int) -> list[Curves]:
    """Train all runs of `task`, in turn on each batch."""
    torch.manual_seed(seed)
    model = task.build()
    batches = torch.Generator().manual_seed(seed)
    # A first step has extra costs (torch imports its compiler, kernels are chosen, threads start). These runs, which
    # are discarded, take them, so that they are not part of the times of whichever run is first.
    for run in make_runs(task, optimizer, model):
        for _ in range(2):
            run.train(*task.draw(torch.Generator().manual_seed(seed)))

    runs = make_runs(task, optimizer, model)
    start = runs[0].vector()
    bar = Bar(task.name, task.steps)
    for step in range(task.steps):
        inputs, targets = task.draw(batches)
        # The runs take turns on each batch, in changing order, so that other load on the machine affects all alike.
        for turn in range(len(runs)):
            runs[(step + turn) % len(runs)].train(inputs, targets)
        if (step + 1) % CHECK == 0 or step + 1 == task.steps:
            reference = runs[0].vector()
            moved = (reference - start).norm()
            for run in runs:
                difference = run.vector() - reference
                run.seen.apart_steps.append(step + 1)
                run.seen.apart_relative.append((difference.norm() / moved).item())
                run.seen.apart_max = difference.abs().max().item()
        bar.show(step + 1, f"loss {runs[0].seen.losses[-1]:.4f} torch, {runs[-1].seen.losses[-1]:.4f} onepass")
    for run in runs:
        run.evaluate(*task.held_out)
    return [run.seen for run in runs]


# ---- Results ----


def disagreements(seen: list[Curves]) -> list[str]:
    """Return in what the last run differs from the first by more than rounding explains."""
    torch_run, fused, ours = seen
    found = []
    for what in ("final_loss", "held_out_loss"):
        theirs, mine = getattr(torch_run, what), getattr(ours, what)
        # The negated comparison counts a NaN as a disagreement.
        if not abs(mine - theirs) <= max(LOSS_RELATIVE * theirs, LOSS_NATS):
            found.append(f"{what.replace('_', ' ')} {mine:.4f} against {theirs:.4f}")
    apart = ours.apart_relative[0]
    if not apart <= max(APART_FACTOR * fused.apart_relative[0], APART_RELATIVE):
        found.append(f"parameters after {CHECK} steps differ by {apart:.1e} of the distance from the start")
    return found


def table(heads: list[str], results: list[list[Curves]]) -> str:
    """Return the results as one table, each task's rows under its heading."""
    rows = [
        ["", "final", "held-out", "held-out", "parameters apart", "", "", "step()", "times", "total", "times"],
        ["", "loss", "loss", "accuracy", "largest", f"step {CHECK}", "end", "s", "faster", "s", "faster"],
    ]
    for runs in results:
        for run in runs:
            apart = [f"{x:.1e}" for x in (run.apart_max, run.apart_relative[0], run.apart_relative[-1])]
            row = [run.label, f"{run.final_loss:.4f}", f"{run.held_out_loss:.4f}", f"{run.accuracy:.1%}"]
            row += apart if run is not runs[0] else ["-"] * 3
            row += [f"{run.step:.3f}", f"{runs[0].step / run.step:.2f}"]
            rows.append([*row, f"{run.seconds:.2f}", f"{runs[0].seconds / run.seconds:.2f}"])
    lines = text_table(rows).splitlines()
    for i, head in enumerate(heads):
        at = 2 + i * (len(results[0]) + 2)
        lines[at:at] = ["-" * len(lines[0]), head]
    return "\n".join(lines)


def draw_png(path: Path, title: str, tasks: list[Task], heads: list[str], results: list[list[Curves]]) -> None:
    """Plot one row per task: the losses, the distance between the runs, and the parts of the time."""
    import matplotlib
    from matplotlib.figure import Figure

    pale, blue, red = "#a9cbea", "#2f6aa8", "#cf3f54"
    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(15, 4.2 * len(tasks)), layout="constrained")
        figure.suptitle(title, fontsize=13)
        axes = figure.subplots(len(tasks), 3)
        for task, head, runs, (losses, apart, bars) in zip(tasks, heads, results, axes, strict=True):
            # The curves nearly coincide: the first is a wide pale line, and the last a thin line on top of it.
            steps = range(1, task.steps + 1)
            losses.axhline(task.untaught, color="0.5", linestyle=":", label="frequencies alone")
            losses.plot(steps, runs[0].losses, color=pale, linewidth=4, label=runs[0].label)
            losses.plot(steps, runs[-1].losses, color=red, linewidth=0.8, label=runs[-1].label)
            losses.set(title=head, xlabel="training step", ylabel="training loss (nats)", ylim=(0, None))
            losses.legend()

            for run, color, width in ((runs[1], blue, 2.5), (runs[-1], red, 1.2)):
                percent = [100 * part for part in run.apart_relative]
                apart.plot(run.apart_steps, percent, color=color, linewidth=width, label=run.label, clip_on=False)
            # symlog, because the distance may be zero.
            apart.set_yscale("symlog", linthresh=1e-5)
            apart.set(title=f"Distance from {runs[0].label}", xlabel="training step", ylim=(0, 100), xlim=(0, None))
            apart.set_ylabel("distance between parameters\n(% of the distance from the start)")
            apart.grid(axis="y", color="0.9")
            apart.legend(loc="upper left")

            names, left = [run.label for run in runs], [0.0] * len(runs)
            for part, color in (("forward_backward", "#d9d9d9"), ("step", "#ee9a2f"), ("other", "#8c8c8c")):
                values = [getattr(run, part) for run in runs]
                label = {"forward_backward": "forward + backward", "step": "optimizer.step()"}.get(part, part)
                bars.barh(names, values, left=left, color=color, label=label, height=0.55)
                left = [a + b for a, b in zip(left, values, strict=True)]
            for y, run in enumerate(runs):
                bars.text(0.02 * max(left), y, f"step() {run.step:.2f} s of {run.seconds:.2f} s", va="center")
            bars.invert_yaxis()
            bars.set(title=f"Time of {task.steps} steps", xlabel="time (s)")
            bars.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.15))
        figure.savefig(path, dpi=110)


def load_average() -> float:
    """Return the system's load average over the last minute; 0 on Windows, which has none."""
    return os.getloadavg()[0] if sys.platform != "win32" else 0.0


def main(args: argparse.Namespace) -> int:
    """Run the demo; return 0 if onepass and torch agree, 1 if not, 2 if it cannot run."""
    try:
        importlib.import_module("matplotlib")
        args.out.mkdir(parents=True, exist_ok=True)
        tasks = [digits(args.optimizer, args.quick), stdlib_text(args.optimizer, args.quick)]
        if args.threads is not None:
            torch.set_num_threads(args.threads)
    except ImportError as error:
        print(f"onepass demo: {error}; install what the demo needs: pip install 'onepass[demo]'", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:  # torch raises the latter for --threads 0
        print(f"onepass demo: {error}", file=sys.stderr)
        return 2
    machine = facts()
    threads = f"{torch.get_num_threads()} threads"
    where = f"{machine['processor']}, {threads}; torch {torch.__version__}, onepass {__version__}"
    print(f"Training with torch.optim, its fused form and onepass side by side; {args.optimizer}.\n{where}", flush=True)
    if torch.get_num_threads() > 1 and (load := load_average()) > 1:
        print(f"This machine is busy (load {load:.1f}), so threads wait for each other: --threads 1 may be faster.")

    heads, results = [], []
    for task in tasks:
        sizes = [p.numel() for p in task.build().parameters()]
        heads.append(f"{task.name}: {sum(sizes):,} parameters in {len(sizes)} tensors")
        results.append(compare(task, args.optimizer, args.seed))
    plan = [f", {task.steps} steps; loss by frequencies alone {task.untaught:.2f}" for task in tasks]
    print("\n" + table([a + b for a, b in zip(heads, plan, strict=True)], results))
    print(
        "Losses in nats. Parameters apart: the largest difference from the first run, and the distance from it\n"
        "relative to the distance from the start. torch's two forms differ by rounding alone; so should onepass.\n"
    )

    draw_png(args.out / "demo.png", f"{args.optimizer} on {where}", tasks, heads, results)
    load = load_average()
    if load > torch.get_num_threads() + 0.5:
        print(f"This machine had other load (load {load:.1f}): the times and their ratios are not reliable.")
    record = {
        "machine": {**machine, "load": load},
        "settings": {key: getattr(args, key) for key in ("optimizer", "seed", "quick")},
        "tasks": [
            {
                "name": task.name,
                "model": head,
                "untaught_loss": task.untaught,
                "disagreements": disagreements(runs),
                "runs": [{**asdict(run), "seconds": run.seconds} for run in runs],
            }
            for task, head, runs in zip(tasks, heads, results, strict=True)
        ],
    }
    (args.out / "demo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"Wrote {args.out / 'demo.png'} and {args.out / 'demo.json'}.")
    found = [f"{t.name}: {what}" for t, runs in zip(tasks, results, strict=True) for what in disagreements(runs)]
    if found:
        print("onepass and torch differ by more than rounding explains.", *found, sep="\n  ", file=sys.stderr)
        return 1
    print("The runs agree to within rounding, and learned the same.")
    return 0
