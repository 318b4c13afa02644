"""Pictures of any runs: figures 2, 9 and 12 of the paper."""

from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.uda.methods.gramians import Row, cosines, norm_ratios, obtuse_share
from benchmarks.uda.methods.rules import RULES
from benchmarks.uda.runs.records import Result, pool, select
from benchmarks.uda.views.style import (
    COLORS,
    LABELS,
    count_seeds,
    draw_curve,
    methods_of,
    new_figure,
    save_all,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 41  # odd: zero, where GH++ puts every conflict, is the middle of a bin
BEFORE = "before"
AFTER = "after (color by rule)"
NULL = "null: same gradients, a random sign for every row of one"


def draw_all(results: Sequence[Result], directory: Path) -> list[Path]:
    """Write all plots to ``directory`` as PNG and return their paths.

    Raises:
        ImportError: if matplotlib is missing.
    """
    return save_all(make_figures(results), directory)


def make_figures(results: Sequence[Result]) -> dict[str, "Figure"]:
    """Draw what every run's result can show, by name."""
    return {
        "cosines": _histograms(results, "cosine of the angle", cosines),
        "inner-products": _histograms(results, "inner product", _inner_products),
        "test-error": _test_errors(results),
    }


def _inner_products(rows: Sequence[Row]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).view(-1, 3)[:, 1]


def _histograms(
    results: Sequence[Result], quantity: str, values: Callable[[Sequence[Row]], Tensor]
) -> "Figure":
    """Draw a grid of methods by rules: before and after, with the null line."""
    methods = methods_of(results)
    rules = [rule for rule in RULES if rule != "sum"]
    figure = new_figure(0.9 + 2.4 * len(methods))
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
                f"{_percent(after)} (null {_percent(null)})\n"
                f"|g1|/|g2|: {_ratio(before)} (median, before)",
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
    return (
        f"{100 * obtuse_share([row for row in rows if all(map(isfinite, row))]):.0f} %"
    )


def _ratio(rows: Sequence[Row]) -> str:
    return f"{float(_finite(norm_ratios(rows)).quantile(0.5)):.3f}"


def _test_errors(results: Sequence[Result]) -> "Figure":
    """Draw the target test error over training, one panel per method."""
    methods = methods_of(results)
    figure = new_figure(3.6)
    grid = figure.subplots(1, len(methods), sharey=True, squeeze=False)
    source_only = select(results, "source-only", "sum")
    for axes, method in zip(grid[0], methods, strict=True):
        if source_only:
            draw_curve(axes, _errors(source_only), "source only", "black", "--")
        for rule in RULES:
            runs = select(results, method, rule)
            draw_curve(axes, _errors(runs), LABELS[rule], COLORS[rule])
        axes.set_title(method, fontsize=10)
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("target test error (%)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle(
        f"{results[0].config['task']}: mean over {count_seeds(results)}, band: +- 1 standard "
        "deviation",
        fontsize=10,
    )
    return figure


def _errors(runs: Sequence[Result]) -> list[list[tuple[int, float]]]:
    return [run.errors for run in runs]
