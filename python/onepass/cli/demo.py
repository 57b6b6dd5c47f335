"""``python -m onepass demo``: train two small models on real data, with torch.optim and with onepass, and compare.

One task is a convolutional net on scikit-learn's handwritten digits, the other a character-level transformer on the
source text of Python's own standard library. Each is trained three times at once, from the same start and on the same
batches: by ``torch.optim`` as it comes, by ``torch.optim`` with ``fused=True``, and by ``onepass``.

The middle one is the yardstick. It is the same optimizer by the same authors and differs from the first by rounding
alone; but training is chaotic, and a difference in the last bit grows from step to step. How far torch's two forms end
up from each other is how far apart correct implementations end up, and onepass is held to that.
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
from .info import facts

# torch's class and ours, and what both are called with besides the learning rate.
CLASSES: dict[str, tuple[Callable[..., Optimizer], Callable[..., Optimizer]]] = {
    "sgd": (torch.optim.SGD, SGD),
    "adam": (torch.optim.Adam, Adam),
    "adamw": (torch.optim.AdamW, AdamW),
}
ARGUMENTS: dict[str, dict[str, float]] = {"sgd": {"momentum": 0.9}, "adam": {}, "adamw": {"weight_decay": 0.1}}

# When two runs agree. Their parameters are judged after the first CHECK steps, while the distance between them is still
# that of rounding: at most ten times the one between torch's two forms, or 1e-4 of the way travelled. (Ten small steps
# in float32 end 1e-5 to 3e-5 from the same steps in float64. Over seeds and optimizers the distance was 0 to 5e-5; for
# an AdamW without its weight decay, or with a wrong beta, epsilon or bias correction, 3e-3 and more.) Later it grows by
# leaps, whenever some unit flips, to as much as 5 % between torch's own two forms. So what is judged at the end is what
# was learned: the losses, to within 3 % or 0.01 nats.
CHECK, APART_FACTOR, APART_RELATIVE, LOSS_RELATIVE, LOSS_NATS = 10, 10.0, 1e-4, 0.03, 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of ``python -m onepass demo``."""
    parser.add_argument("--out", type=Path, default=Path("demo-results"), metavar="DIR", help="folder for the results")
    parser.add_argument("--optimizer", type=plain_name, choices=sorted(CLASSES), default="adamw", help="default: adamw")
    parser.add_argument("--seed", type=int, default=0, help="of the initial parameters and the batches; default: 0")
    parser.add_argument("--threads", type=int, help="CPU threads; default: as many as torch takes")
    parser.add_argument("--quick", action="store_true", help="a few steps only, which learn little")


# ---- The tasks ----


class Block(nn.Module):
    """A transformer layer: attention, then a perceptron, each on a normalised input and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Maps (batch, context, width) to the same shape."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
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
        # Positions enter as ALiBi (Press et al. 2022): a score falls with the distance, for each head at its own rate.
        # Within the minute there is, this learns far more than learned positions do.
        distance = torch.arange(context).unsqueeze(1) - torch.arange(context)
        slopes = 2.0 * 0.25 ** torch.arange(heads).view(-1, 1, 1)
        self.register_buffer("bias", torch.where(distance < 0, -torch.inf, -slopes * distance))

    def forward(self, text: Tensor) -> Tensor:
        """Returns logits (batch, context, 128) for text (batch, context)."""
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
    """Handwritten digits: 1797 grey images of 8 x 8 pixels, a quarter of them held out."""
    # Imported only here, as an extra, and by name, as it comes without types.
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
    """The source of Python's standard library (not its packages), by characters; every tenth file is held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if len(files) < 10:
        raise FileNotFoundError("this Python's standard library does not come as .py files, which the demo reads")
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
    """The loss on `test`, in nats, of predicting each class by how often it occurs in `train`."""
    counts = torch.bincount(train, minlength=128).double() + 1e-3
    return float(-(counts / counts.sum()).log()[test].mean())


# ---- Training ----


@dataclass
class Curves:
    """What one run leaves behind: times in seconds, losses in nats, and its distance from the first run.

    The times do not hold the drawing of the batches, which the runs share. Distances are relative to how far the
    first run's parameters have come from their start, both as Euclidean norms; `apart_max` is the largest difference.
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
        """All the time that this run took."""
        return self.forward_backward + self.step + self.other


class Run:
    """One of the runs that are compared: a model, its optimizer, and what has been seen of them."""

    def __init__(self, label: str, model: nn.Module, optimizer: Optimizer, steps: int) -> None:
        self.model, self.optimizer, self.seen = model, optimizer, Curves(label)
        # torch's scheduler drives onepass too: as for any drop-in, nothing else in the training loop changes.
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, optimizer.defaults["lr"], total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
        )

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats, over images or over every position of every text."""
        return nn.functional.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())

    def train(self, inputs: Tensor, targets: Tensor) -> None:
        """Takes one training step and notes what it took."""
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
        """All parameters, one after the other."""
        return nn.utils.parameters_to_vector(self.model.parameters())

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> None:
        """Notes the losses at the end and the accuracy on held-out data."""
        last = self.seen.losses[-20:]
        self.seen.final_loss = sum(last) / len(last)
        self.seen.held_out_loss = self.loss(inputs, targets).item()
        self.seen.accuracy = (self.model(inputs).argmax(-1) == targets).float().mean().item()


def make_runs(task: Task, optimizer: str, model: nn.Module) -> list[Run]:
    """Copies `model` once for each run: torch's default first, onepass last."""
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
    """Trains `task` with every side, all in turn on each batch."""
    torch.manual_seed(seed)
    model = task.build()
    batches = torch.Generator().manual_seed(seed)
    # What only a first step costs (torch imports its compiler there, kernels are chosen, threads start) would fall on
    # whichever side goes first; models that are thrown away pay for it.
    for run in make_runs(task, optimizer, model):
        for _ in range(2):
            run.train(*task.draw(torch.Generator().manual_seed(seed)))

    runs = make_runs(task, optimizer, model)
    start = runs[0].vector()
    bar = Bar(task.name, task.steps)
    for step in range(task.steps):
        inputs, targets = task.draw(batches)
        # The machine may be busy with something else for a while. Taking turns on each batch, and in going first,
        # spreads that over all sides alike.
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
    """Says in what the last run differs from the first by more than rounding explains."""
    torch_run, fused, ours = seen
    found = []
    for what in ("final_loss", "held_out_loss"):
        theirs, mine = getattr(torch_run, what), getattr(ours, what)
        # Written so that a NaN disagrees.
        if not abs(mine - theirs) <= max(LOSS_RELATIVE * theirs, LOSS_NATS):
            found.append(f"{what.replace('_', ' ')} {mine:.4f} against {theirs:.4f}")
    apart = ours.apart_relative[0]
    if not apart <= max(APART_FACTOR * fused.apart_relative[0], APART_RELATIVE):
        found.append(f"parameters after {CHECK} steps apart by {apart:.1e} of the way travelled")
    return found


def table(heads: list[str], results: list[list[Curves]]) -> str:
    """Lays the results out as one table, each task's rows under a line that names it."""
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
    lines = ["{:17}{:>8}{:>10}{:>10}{:>18.18}{:>9}{:>9}{:>9}{:>8}{:>8}{:>8}".format(*row) for row in rows]
    for i, head in enumerate(heads):
        at = 2 + i * (len(results[0]) + 2)
        lines[at:at] = ["-" * len(lines[0]), head]
    return "\n".join(lines)


def draw_png(path: Path, title: str, tasks: list[Task], heads: list[str], results: list[list[Curves]]) -> None:
    """Draws, one row a task: the losses, the distance between the runs, and where the time went."""
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
            # The curves nearly coincide: the first is drawn broad and pale, and the last as a fine line upon it.
            steps = range(1, task.steps + 1)
            losses.axhline(task.untaught, color="0.5", linestyle=":", label="frequencies alone")
            losses.plot(steps, runs[0].losses, color=pale, linewidth=4, label=runs[0].label)
            losses.plot(steps, runs[-1].losses, color=red, linewidth=0.8, label=runs[-1].label)
            losses.set(title=head, xlabel="training step", ylabel="training loss (nats)", ylim=(0, None))
            losses.legend()

            for run, colour, width in ((runs[1], blue, 2.5), (runs[-1], red, 1.2)):
                percent = [100 * part for part in run.apart_relative]
                apart.plot(run.apart_steps, percent, color=colour, linewidth=width, label=run.label, clip_on=False)
            # Logarithmic, but with a place for zero: the runs may well be identical.
            apart.set_yscale("symlog", linthresh=1e-5)
            apart.set(title=f"Distance from {runs[0].label}", xlabel="training step", ylim=(0, 100), xlim=(0, None))
            apart.set_ylabel("distance between parameters\n(% of the way travelled)")
            apart.grid(axis="y", color="0.9")
            apart.legend(loc="upper left")

            names, left = [run.label for run in runs], [0.0] * len(runs)
            for part, colour in (("forward_backward", "#d9d9d9"), ("step", "#ee9a2f"), ("other", "#8c8c8c")):
                values = [getattr(run, part) for run in runs]
                label = {"forward_backward": "forward + backward", "step": "optimizer.step()"}.get(part, part)
                bars.barh(names, values, left=left, color=colour, label=label, height=0.55)
                left = [a + b for a, b in zip(left, values, strict=True)]
            for y, run in enumerate(runs):
                bars.text(0.02 * max(left), y, f"step() {run.step:.2f} s of {run.seconds:.2f} s", va="center")
            bars.invert_yaxis()
            bars.set(title=f"Where the time of {task.steps} steps went", xlabel="time (s)")
            bars.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.15))
        figure.savefig(path, dpi=110)


def load_average() -> float:
    """How many threads wanted to run over the last minute, of any process; 0 where the system does not tell."""
    return os.getloadavg()[0] if sys.platform != "win32" else 0.0


def main(args: argparse.Namespace) -> int:
    """Runs the demo; returns 0 if onepass and torch agree, 1 if not, 2 if it cannot run."""
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
        print(f"This machine is busy (load {load:.1f}), and threads wait for one another: --threads 1 may be faster.")

    heads, results = [], []
    for task in tasks:
        sizes = [p.numel() for p in task.build().parameters()]
        heads.append(f"{task.name}: {sum(sizes):,} parameters in {len(sizes)} tensors")
        results.append(compare(task, args.optimizer, args.seed))
    plan = [f", {task.steps} steps; loss by frequencies alone {task.untaught:.2f}" for task in tasks]
    print("\n" + table([a + b for a, b in zip(heads, plan, strict=True)], results))
    print(
        "Losses in nats. Parameters apart from those of the first run: the largest difference, then the distance as a\n"
        "fraction of the way travelled. Rounding alone sets torch's two forms apart; onepass is held to that.\n"
    )

    draw_png(args.out / "demo.png", f"{args.optimizer} on {where}", tasks, heads, results)
    load = load_average()
    if load > torch.get_num_threads() + 0.5:
        print(f"This machine had other work too (load {load:.1f}): the times, and their ratios above all, say little.")
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
