"""Plots of a recording, each on axes of matplotlib: extra ``[plot]``.

Every function draws on the axes that it is given, and returns nothing; ``figure`` makes
one with all of them, which a notebook shows.
"""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from ghopt.extras import from_extra
from ghopt.recording import Recording

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Plot: TypeAlias = Callable[[Recording, "Axes"], None]

MOST_LINES = 8
"""Lines in one plot at most: those of the pairs or tasks that are in conflict most."""

COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#000000", "#777777"),
)
"""Of lines, bars and areas: Okabe and Ito's, which color-blind readers can tell apart."""

MOST_LAYERS = 20
_POINTS = 400  # of a line: more cannot be seen, and make files of megabytes
_BINS = 41
_LETTERS = 40


def conflict_rate(recording: Recording, axes: "Axes") -> None:
    """Draw which share of the steps each pair is in conflict, over time."""
    axes.set_prop_cycle(color=COLORS)
    shares = recording.conflict_shares
    worst = sorted(recording.pairs, key=lambda pair: -shares[pair])[:MOST_LINES]
    for i, j in worst:
        obtuse = recording.conflicts[:, i, j].double()
        obtuse[recording.gramians[:, i, j].isnan()] = torch.nan
        _line(axes, recording, 100 * obtuse, _pair(recording, i, j))
    # By nature, and at angles that hardly differ from a right one.
    axes.axhline(50, color="0.6", linestyle=":", label="unrelated gradients")
    axes.set(xlabel="step", ylabel="steps in conflict, %", ylim=(-3, 103))
    _legend(axes)


def cosine_map(recording: Recording, axes: "Axes") -> None:
    """Draw the mean cosine of each pair of tasks as a map."""
    means = recording.cosines.nanmean(0)
    names = [_label(name) for name in recording.names]
    image = axes.imshow(means.tolist(), cmap="RdBu", vmin=-1, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    if len(names) <= MOST_LINES:
        for i, row in enumerate(means.tolist()):
            for j, value in enumerate(row):
                color = "white" if abs(value) > 0.6 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color)
    axes.figure.colorbar(image, ax=axes, label="mean cosine", fraction=0.046)


def before_and_after(recording: Recording, axes: "Axes") -> None:
    """Draw what works against the tasks: the sum, the update as weighed, the step taken.

    Cosines of each with the task gradients: below 0 a task is opposed. The step, where it
    was recorded, counts with its sign turned, as gradients do.
    """
    drawn = {
        "plain sum": recording.update_cosines(torch.ones_like(recording.weights)),
        "as weighed": recording.update_cosines(recording.weights),
    }
    axes.set_prop_cycle(color=COLORS)
    if recording.has_steps.any():
        drawn["step taken"] = -recording.step_cosines
    for name, found in drawn.items():
        values = found.flatten()
        values = values[values.isfinite()].clamp(-1, 1)
        share = torch.histc(values, _BINS, -1, 1) / max(1, len(values))
        edges = torch.linspace(-1, 1, _BINS + 1, dtype=torch.float64, device="cpu")
        axes.stairs(
            (100 * share).tolist(), edges.tolist(), fill=True, alpha=0.5, label=name
        )
    axes.axvline(0, color="0.4", linewidth=1)
    axes.set(xlabel="cosine of update and task gradient", ylabel="share, %")
    _legend(axes)


def weights_over_time(recording: Recording, axes: "Axes") -> None:
    """Draw the weight of each task, over time."""
    axes.set_prop_cycle(color=COLORS)
    spread = recording.weights.nan_to_num(1, 1, 1).std(0, unbiased=False)
    most = spread.argsort(descending=True)[:MOST_LINES].sort().values.tolist()
    for task in most:
        _line(axes, recording, recording.weights[:, task], recording.names[task])
    axes.axhline(1, color="0.6", linestyle=":", label="plain sum")
    axes.set(xlabel="step", ylabel="weight (1: as in the sum)")
    _legend(axes)


def layer_conflict(recording: Recording, axes: "Axes") -> None:
    """Draw in which share of the steps each layer has a pair in conflict."""
    axes.set_prop_cycle(color=COLORS)
    shares = recording.layer_shares
    names = list(shares)
    if len(names) > MOST_LAYERS:
        worst = set(sorted(names, key=lambda name: -shares[name])[:MOST_LAYERS])
        names = [name for name in names if name in worst]  # in the order of the model
    axes.barh(
        [_label(name or "(root)") for name in names], [100 * shares[n] for n in names]
    )
    axes.invert_yaxis()
    axes.set(xlabel="steps with a pair in conflict, %", xlim=(0, 100))


PLOTS: dict[str, Plot] = {
    "How often tasks are in conflict": conflict_rate,
    "Mean cosines between tasks": cosine_map,
    "What the update does to the tasks": before_and_after,
    "Weights of the tasks": weights_over_time,
    "Conflict by layer": layer_conflict,
}
"""By title. The last one is for recordings with layers."""


def figure(recording: Recording) -> "Figure":
    """Draw all plots that a recording has something for.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if nothing was recorded.
    """
    chosen = plots_of(recording)
    whole = new_figure(6.4, 3.2 * len(chosen))
    every = whole.subplots(len(chosen), squeeze=False)
    for (title, plot), axes in zip(chosen.items(), every[:, 0], strict=True):
        plot(recording, axes)
        axes.set_title(title)
    return whole


def plots_of(recording: Recording) -> dict[str, Plot]:
    """List the plots that a recording has something for.

    Raises:
        ValueError: if nothing was recorded.
    """
    if not len(recording):
        raise ValueError("recording must have a step, got none")
    return {
        title: plot
        for title, plot in PLOTS.items()
        if (recording.layer_shares or plot is not layer_conflict)
        and (recording.pairs or plot in (before_and_after, weights_over_time))
    }


def new_figure(width: float, height: float) -> "Figure":
    """Make a figure of some inches that no window shows, but a notebook does.

    Raises:
        ImportError: if matplotlib is missing; names the extra that installs it.
    """
    with from_extra("plot"):
        from matplotlib.figure import Figure

    class Shown(Figure):
        """Notebooks know only figures of pyplot, and would keep them all in memory."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    return Shown(figsize=(width, height), layout="constrained")


def _pair(recording: Recording, i: int, j: int) -> str:
    return f"{recording.names[i]} / {recording.names[j]}"


def _line(axes: "Axes", recording: Recording, values: Tensor, name: str) -> None:
    """Draw means over time: of as many steps each as points can be seen."""
    size = -(-len(values) // _POINTS)
    # A share of single steps would be a block of 0 and 100: of twenty it is a line.
    size = max(size, min(20, len(values) // 10), 1)
    steps = torch.split(recording.steps.double(), size)
    parts = zip(steps, torch.split(values, size), strict=True)
    points = [(float(s.mean()), float(v.nanmean())) for s, v in parts]
    axes.plot(*zip(*points, strict=True), label=_label(name), linewidth=1.2)


def _label(name: str) -> str:
    """Escape what matplotlib takes for mathematics, or leaves out of legends.

    What cannot be printed would break the file, and long names the layout.
    """
    shown = "".join(letter if letter.isprintable() else "?" for letter in name)
    escaped = shown[:_LETTERS].replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _legend(axes: "Axes") -> None:
    axes.legend(fontsize="small", framealpha=0.6)
