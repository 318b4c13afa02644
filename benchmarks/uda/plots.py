"""Plots of stored runs: the angles as in the paper's Fig. 12, and the test errors.

``python -m benchmarks.uda.plots uda-results`` draws them again from the results there.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.uda.extra import bench_extra
from benchmarks.uda.results import (
    Result,
    Row,
    cosines,
    obtuse_share,
    pool,
    read_results,
    select,
)
from benchmarks.uda.rules import RULES

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
BINS = 41  # odd: zero, where GH++ puts every conflict, is the middle of a bin
BEFORE = "before"
AFTER = "after (color by rule)"
NULL = "null: same gradients, a random sign for every row of one"
WIDTH = 9.0  # inches; at 100 dots per inch the width of a README


def draw_all(results: Sequence[Result], directory: Path) -> list[Path]:
    """Write all plots to ``directory`` as PNG and return their paths.

    Raises:
        ImportError: if matplotlib is missing.
    """
    figures = {
        "cosines": _histograms(results, "cosine of the angle", cosines),
        "inner-products": _histograms(results, "inner product", _inner_products),
        "test-error": _test_errors(results),
    }
    paths = []
    for name, figure in figures.items():
        path = directory / f"{name}.png"
        figure.savefig(path, dpi=100)
        paths.append(path)
    return paths


def _inner_products(rows: Sequence[Row]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).view(-1, 3)[:, 1]


def _new_figure(height: float) -> "Figure":
    """Make a figure that no global state of pyplot knows, so that nobody closes it."""
    with bench_extra():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _harmonized_methods(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(one.method for one in results if one.before))


def _histograms(
    results: Sequence[Result], quantity: str, values: Callable[[Sequence[Row]], Tensor]
) -> "Figure":
    """Draw a grid of methods by rules: before and after, with the null line."""
    methods = _harmonized_methods(results)
    rules = [rule for rule in RULES if rule != "sum"]
    figure = _new_figure(0.9 + 2.3 * len(methods))
    grid = figure.subplots(
        len(methods), len(rules), sharex="row", sharey="row", squeeze=False
    )
    for axes_row, method in zip(grid, methods, strict=True):
        null = pool(select(results, method, "sum"), "null")
        rows = pool(select(results, method, "sum"), "before")
        # Not 0, where nothing has an inner product yet: bins need a width.
        limit = max(1e-12, float(_finite(values(rows)).abs().quantile(0.98)))
        for axes, rule in zip(axes_row, rules, strict=True):
            runs = select(results, method, rule)
            before, after = pool(runs, "before"), pool(runs, "after")
            samples = [_finite(values(one)) for one in (before, after, null)]
            _histogram(axes, samples, limit, rule)
            axes.set_title(
                f"{method}, {LABELS[rule]}\nobtuse: {_percent(before)}, then "
                f"{_percent(after)} (null {_percent(null)})",
                fontsize=9,
            )
        axes_row[0].set_ylabel("share of updates")
    for axes in grid[-1]:
        axes.set_xlabel(quantity)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(
        f"Alignment and classification gradients: {quantity} before and after\n"
        "(values beyond the axis are in the outermost bins; unrelated gradients are "
        "obtuse half of the time)",
        fontsize=10,
    )
    return figure


def _histogram(axes: "Axes", values: list[Tensor], limit: float, rule: str) -> None:
    """Draw before (filled), after (outline) and null (line) as shares of each."""
    edges = torch.linspace(-limit, limit, BINS + 1, dtype=torch.float64)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    before, after, null = (
        (torch.histc(one.clamp(-limit, limit), BINS, -limit, limit) / max(1, len(one)))
        for one in values
    )
    axes.bar(middles, before.tolist(), 2 * limit / BINS, color="#cccccc", label=BEFORE)
    axes.stairs(after.tolist(), edges.tolist(), color=COLORS[rule], label=AFTER)
    axes.plot(middles, null.tolist(), "k--", linewidth=1, label=NULL)
    axes.axvline(0, color="black", linewidth=0.5)
    # GH++ makes every conflict orthogonal: its bin would flatten all others.
    top = 1.5 * float(torch.maximum(before, null).max())
    axes.set_ylim(0, top)
    if after.max() > top:
        share = f"{100 * float(after.max()):.0f} % here"
        axes.annotate(
            share, (0, 0.9 * top), (4, 0), textcoords="offset points", fontsize=8
        )
    axes.tick_params(labelsize=8)


def _finite(values: Tensor) -> Tensor:
    """Leave out the steps of a run that has diverged."""
    return values[values.isfinite()]


def _percent(rows: Sequence[Row]) -> str:
    return f"{100 * obtuse_share(rows):.0f} %"


def _test_errors(results: Sequence[Result]) -> "Figure":
    """Draw the target test error over training, one panel per method."""
    methods = _harmonized_methods(results)
    figure = _new_figure(3.6)
    grid = figure.subplots(1, len(methods), sharey=True, squeeze=False)
    source_only = select(results, "source-only", "sum")
    for axes, method in zip(grid[0], methods, strict=True):
        if source_only:
            _curve(axes, source_only, "source only", "black", "--")
        for rule in RULES:
            _curve(axes, select(results, method, rule), LABELS[rule], COLORS[rule])
        axes.set_title(method, fontsize=10)
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("target test error (%)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)
    seeds = len({result.config["seed"] for result in results})
    figure.suptitle(
        f"{results[0].config['task']}: mean over {seeds} seed(s), band: +- 1 standard "
        "deviation",
        fontsize=10,
    )
    return figure


def _curve(
    axes: "Axes", runs: list[Result], label: str, color: str, style: str = "-"
) -> None:
    steps = [step for step, _ in runs[0].errors]
    errors = torch.tensor([[error for _, error in run.errors] for run in runs])
    middle = errors.mean(0)
    axes.plot(steps, middle.tolist(), style, color=color, label=label, linewidth=1.3)
    if len(runs) > 1:
        spread = errors.std(0)
        low, high = (middle - spread).tolist(), (middle + spread).tolist()
        axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    draw_all(read_results(folder / "results.jsonl"), folder)
