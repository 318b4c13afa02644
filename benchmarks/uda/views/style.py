"""What the pictures share: colors, names, a figure, a curve."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.uda.runs.records import Result
from ghopt.extras import from_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "sum": "plain sum",
    "gh": "GH",
    "ghpp": "GH++",
    "ghpp_printed": "GH++ as printed",
}
# Okabe and Ito's colors, told apart by color-blind readers too.
COLORS = {
    "sum": "#555555",
    "gh": "#0072b2",
    "ghpp": "#d55e00",
    "ghpp_printed": "#009e73",
}
WIDTH = 9.0  # inches; at 100 dots per inch the width of a README


def save_all(figures: dict[str, "Figure"], directory: Path) -> list[Path]:
    """Write figures to ``directory`` as PNG and return their paths."""
    paths = []
    for name, figure in figures.items():
        path = directory / f"{name}.png"
        figure.savefig(path, dpi=100)
        paths.append(path)
    return paths


def new_figure(height: float) -> "Figure":
    """Make a figure that no global state of pyplot knows, so that nobody closes it."""
    with from_extra("bench"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def methods_of(results: Sequence[Result]) -> list[str]:
    """Name the methods with two losses, in the order of their runs."""
    return list(dict.fromkeys(one.method for one in results if one.before))


def draw_curve(
    axes: "Axes",
    runs: Sequence[Sequence[tuple[int, float]]],
    label: str,
    color: str,
    style: str = "-",
) -> None:
    """Draw the mean over runs of (step, value), and its standard deviation."""
    steps = [step for step, _ in runs[0]]
    values = torch.tensor([[value for _, value in run] for run in runs])
    middle = values.mean(0)
    axes.plot(steps, middle.tolist(), style, color=color, label=label, linewidth=1.3)
    if len(runs) > 1:
        spread = values.std(0)
        low, high = (middle - spread).tolist(), (middle + spread).tolist()
        axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)


def count_seeds(results: Sequence[Result]) -> str:
    """Say how many seeds there are."""
    count = len({result.config["seed"] for result in results})
    return f"{count} seed{'s' if count > 1 else ''}"
