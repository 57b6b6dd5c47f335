"""TensorBoard: a run logged by ``log_to``, how to open it, and a plot of its event file.

``log_to`` uses hooks of the optimizer's step, so the training loop does not change; it writes only the losses. Each run
has its own folder, and TensorBoard shows all runs together.
"""

from __future__ import annotations

import importlib
import shlex
from itertools import count
from pathlib import Path

import numpy as np
import onepass
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle
from onepass.cli.demo import Task, digits
from onepass.examples.common import GREY, HALO, INK, Gallery, Numbers, alone, evaluate
from torch import nn
from torch.utils.tensorboard import SummaryWriter

LR, STEPS, INTERVAL = 4e-3, 150, 5
SCHEDULE = "warmup(20, start=0.1) >> cosine(130)"

Scalars = dict[str, tuple[Numbers, Numbers]]  # tag -> steps and values


def new_folder(out: Path) -> Path:
    """Return the first of run-1, run-2, ... that does not exist: two runs in one folder would be one curve."""
    return next(folder for n in count(1) if not (folder := out / f"run-{n}").exists())


def train(task: Task, folder: Path, steps: int) -> None:
    """Train the net and log into the folder."""
    torch.manual_seed(0)
    model = task.build()
    batches = torch.Generator().manual_seed(0)
    optimizer = onepass.AdamW(model.parameters(), lr=LR)
    schedule = onepass.ScheduleLR(optimizer, SCHEDULE)
    with SummaryWriter(folder) as writer, onepass.log_to(writer, optimizer, interval=INTERVAL):
        for step in range(steps):
            inputs, targets = task.draw(batches)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            schedule.step()
            writer.add_scalar("digits/loss", loss.item(), step)
            if step % INTERVAL == 0:
                held_out_loss, accuracy = evaluate(model, task)
                writer.add_scalar("digits/held_out_loss", held_out_loss, step)
                writer.add_scalar("digits/held_out_accuracy", accuracy, step)


def read(folder: Path) -> Scalars:
    """Return all scalars of the event file in this folder."""
    # Imported by name, because tensorboard has no types.
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: keep all, not a sample
    events.Reload()
    found = {tag: events.Scalars(tag) for tag in sorted(events.Tags()["scalars"])}
    return {
        tag: (np.array([e.step for e in scalars]), np.array([e.value for e in scalars]))
        for tag, scalars in found.items()
    }


def run(gallery: Gallery) -> None:
    folder = new_folder(gallery.out / "tensorboard_run")
    train(digits("adamw", gallery.quick), folder, 20 if gallery.quick else STEPS)
    gallery.print(f"AdamW, lr {LR:g} times {SCHEDULE}; log_to every {INTERVAL} steps. To see it live:")
    gallery.print(f"\n    tensorboard --logdir {shlex.quote(str(folder.parent))}\n")
    gallery.print(f"which shows every run in that folder; {folder.name}:")
    scalars = read(folder)
    gallery.table(
        ["tag", "values", "first", "last", "least", "largest"],
        ([tag, len(v), *map(float, (v[0], v[-1], v.min(), v.max()))] for tag, (_, v) in scalars.items()),
    )
    draw(gallery, scalars, folder.name)


# -- the page --------------------------------------------------------------------------------------------------------

PAGE, EDGE, BAR, CURVE = "#f3f4f6", "#d5d9de", "#f57c00", "#ff7043"
COLUMNS, ROW, HEAD = 3, 2.15, 0.34  # inches: of a row of cards, of a section's name


def draw(gallery: Gallery, scalars: Scalars, name: str) -> None:
    """Draw one card per scalar, by section, in TensorBoard's layout."""
    sections: dict[str, list[str]] = {}
    for tag in scalars:
        sections.setdefault(tag.split("/")[0], []).append(tag)
    rows = {section: -(-len(tags) // COLUMNS) for section, tags in sections.items()}
    width, height = 10.0, 0.62 + sum(HEAD + ROW * n for n in rows.values())
    with gallery.picture("tensorboard_run", width, height) as figure:
        figure.set_layout_engine("none")
        figure.set_facecolor(PAGE)

        def box(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
            """Return inches from the upper left corner as fractions of the figure."""
            return x / width, 1 - (y + h) / height, w / width, h / height

        left, bottom, w, h = box(0, 0, width, 0.42)
        figure.add_artist(Rectangle((left, bottom), w, h, color=BAR))
        middle = bottom + h / 2
        figure.text(0.15 / width, middle, "TensorBoard's scalars", color="white", fontsize=12, va="center")
        note = f"drawn from the event file of {name}; smoothing 0; horizontal: step"
        figure.text(1 - 0.15 / width, middle, note, color="white", va="center", ha="right")
        y = 0.5
        for section, tags in sections.items():
            x0, y0, _, h = box(0.15, y, 1, HEAD)
            figure.text(x0, y0 + h / 2, section, fontsize=11, va="center")
            figure.text(1 - x0, y0 + h / 2, f"{len(tags)} cards", color=GREY, va="center", ha="right")
            y += HEAD
            for number, tag in enumerate(tags):
                row, column = divmod(number, COLUMNS)
                card = (width - 0.2) / COLUMNS
                at = 0.15 + column * card, y + row * ROW
                x0, y0, w, h = box(*at, card - 0.1, ROW - 0.1)
                rounded = "round,pad=0,rounding_size=0.004"
                figure.add_artist(FancyBboxPatch((x0, y0), w, h, rounded, fc="white", ec=EDGE, zorder=-1))
                figure.text(x0 + 0.1 / width, y0 + h - 0.17 / height, tag, va="center", fontsize=9.5)
                draw_card(figure.add_axes(box(at[0] + 0.58, at[1] + 0.36, card - 0.85, ROW - 0.75)), *scalars[tag])
            y += rows[section] * ROW


def draw_card(axes: Axes, steps: Numbers, values: Numbers) -> None:
    axes.plot(steps, values, color=CURVE)
    axes.plot(steps[-1], values[-1], "o", color=CURVE, markersize=4, clip_on=False)
    axes.annotate(
        f"{values[-1]:.3g}", (1, 1), (0, 3), xycoords="axes fraction", textcoords="offset points",
        ha="right", va="bottom", fontsize=8, color=INK, path_effects=HALO,
    )  # fmt: skip
    axes.tick_params(labelsize=8, length=0)
    axes.spines[:].set_color(EDGE)
    axes.set_xlim(0, steps[-1])
    if np.ptp(values) == 0:
        axes.set_ylim(0, 2 * values[0] or 1)
    axes.locator_params(axis="y", nbins=4)
    axes.yaxis.set_major_formatter("{x:g}")


if __name__ == "__main__":
    alone(run)
