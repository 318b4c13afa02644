"""Plots of stored runs: figures 2 and 8 to 14 of the paper, as far as runs are stored.

``python -m benchmarks.uda.plots uda-results`` draws those of the main job again from the
results there; ``python -m benchmarks.uda.figures`` draws all.
"""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.common.extra import bench_extra
from benchmarks.uda.methods.networks import CLASSES
from benchmarks.uda.methods.rules import FLIPS, LAMBDAS, RULES
from benchmarks.uda.methods.steps import SOURCE_ONLY
from benchmarks.uda.results import (
    Result,
    Row,
    Watched,
    cosines,
    norm_ratios,
    obtuse_share,
    pool,
    read_results,
    select,
)

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
SHOWN = ("sum", "gh", "ghpp")
"""Rules whose features are drawn."""
FLIP_LABELS = {"minus_alignment": "-g1, +g2", "minus_classification": "+g1, -g2"}
SOURCE, TARGET = "#d55e00", "#0072b2"
BINS = 41  # odd: zero, where GH++ puts every conflict, is the middle of a bin
BEFORE = "before"
AFTER = "after (color by rule)"
NULL = "null: same gradients, a random sign for every row of one"
WIDTH = 9.0  # inches; at 100 dots per inch the width of a README


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = ArgumentParser("python -m benchmarks.uda.plots", description=__doc__)
    parser.add_argument("folder", type=Path, help="with the main job's results.jsonl")
    folder = parser.parse_args(arguments).folder
    path = folder / "results.jsonl"
    try:
        results = read_results(path)
        if not results:
            raise ValueError(f"{path} has no run")
        draw_all(results, folder)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))


def draw_all(results: Sequence[Result], directory: Path) -> list[Path]:
    """Write all plots to ``directory`` as PNG and return their paths.

    Raises:
        ImportError: if matplotlib is missing.
    """
    return _save(make_figures(results), directory)


def draw_watched(results: Sequence[Watched], directory: Path) -> list[Path]:
    """Write the plots of watched runs to ``directory`` and return their paths.

    Raises:
        ImportError: if matplotlib is missing.
    """
    return _save(make_watched_figures(results), directory)


def make_figures(results: Sequence[Result]) -> dict[str, "Figure"]:
    """Draw what every run's result can show, by name."""
    return {
        "cosines": _histograms(results, "cosine of the angle", cosines),
        "inner-products": _histograms(results, "inner product", _inner_products),
        "test-error": _test_errors(results),
    }


def make_watched_figures(results: Sequence[Watched]) -> dict[str, "Figure"]:
    """Draw what watched runs can show, by name: Fig. 8, 10, 11, 13 and 14.

    Every method needs all runs of :func:`benchmarks.uda.figures.make_configs`.
    """
    return {
        "t-sne": _embeddings(results),
        "confusion": _confusions(results),
        "balance": _balances(results),
        "sign-flips": _sign_flips(results),
        "lambda": _lambdas(results),
    }


def _save(figures: dict[str, "Figure"], directory: Path) -> list[Path]:
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
    figure = _new_figure(0.9 + 2.4 * len(methods))
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
    methods = _harmonized_methods(results)
    figure = _new_figure(3.6)
    grid = figure.subplots(1, len(methods), sharey=True, squeeze=False)
    source_only = select(results, "source-only", "sum")
    for axes, method in zip(grid[0], methods, strict=True):
        if source_only:
            _curve(axes, _errors(source_only), "source only", "black", "--")
        for rule in RULES:
            runs = select(results, method, rule)
            _curve(axes, _errors(runs), LABELS[rule], COLORS[rule])
        axes.set_title(method, fontsize=10)
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("target test error (%)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle(
        f"{results[0].config['task']}: mean over {_seeds(results)}, band: +- 1 standard "
        "deviation",
        fontsize=10,
    )
    return figure


def _errors(runs: Sequence[Result]) -> list[list[tuple[int, float]]]:
    return [run.errors for run in runs]


def _curve(
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


def _embeddings(results: Sequence[Watched]) -> "Figure":
    """Draw the features of both domains by t-SNE, methods by rules."""
    methods = _harmonized_methods(results)
    figure = _new_figure(0.8 + 3 * len(methods))
    grid = figure.subplots(len(methods), len(SHOWN), squeeze=False)
    for axes_row, method in zip(grid, methods, strict=True):
        for axes, rule in zip(axes_row, SHOWN, strict=True):
            run = select(results, method, rule)[0]
            for domain, color in (("source", SOURCE), ("target", TARGET)):
                x, y, _ = zip(*run.points[domain], strict=True)
                axes.scatter(x, y, s=5, color=color, alpha=0.6, linewidths=0)
            _name_classes(axes, run)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(
                f"{method}, {LABELS[rule]}: {run.accuracy:.0f} %", fontsize=9
            )
    handles = [
        grid[0, 0].scatter([], [], s=30, color=color, label=label)
        for label, color in (
            ("source", SOURCE),
            ("target (test images)", TARGET),
        )
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle(
        f"{results[0].config['task']}: t-SNE of the features after the last step, seed 0 "
        "\n(digits: middle of a class of the source; percent: target test accuracy)",
        fontsize=10,
    )
    return figure


def _name_classes(axes: "Axes", run: Watched) -> None:
    points = torch.tensor(run.points["source"])
    for label in {label for _, _, label in run.points["source"]}:
        x, y = points[points[:, 2] == label, :2].median(0).values.tolist()
        box = {"boxstyle": "circle,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8}
        axes.text(x, y, str(label), ha="center", va="center", fontsize=8, bbox=box)


def _confusions(results: Sequence[Watched]) -> "Figure":
    """Draw the confusion matrices of the target's test set, methods by rules."""
    methods = _harmonized_methods(results)
    figure = _new_figure(0.8 + 3.1 * len(methods))
    grid = figure.subplots(len(methods), len(SHOWN), sharex=True, sharey=True)
    grid = grid.reshape(len(methods), len(SHOWN))
    for axes_row, method in zip(grid, methods, strict=True):
        for axes, rule in zip(axes_row, SHOWN, strict=True):
            runs = select(results, method, rule)
            counts = torch.tensor([run.confusion for run in runs]).sum(0)
            shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
            _matrix(axes, shares)
            axes.set_title(f"{method}, {LABELS[rule]}", fontsize=9)
        axes_row[0].set_ylabel("true class", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("predicted class", fontsize=9)
    figure.suptitle(
        f"{results[0].config['task']}: target test images by their class, in percent of "
        f"the row\n(below 5 left out; {_seeds(results)})",
        fontsize=10,
    )
    return figure


def _matrix(axes: "Axes", shares: Tensor) -> None:
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(shares)))
    axes.set_yticks(range(len(shares)))
    axes.tick_params(labelsize=8, length=0)
    for row, column in (shares >= 5).nonzero().tolist():
        share = float(shares[row, column])
        color = "white" if share > 55 else "black"
        axes.text(
            column,
            row,
            f"{share:.0f}",
            ha="center",
            va="center",
            fontsize=7,
            color=color,
        )


def _balances(results: Sequence[Watched]) -> "Figure":
    """Draw MMD and max J(W) over training, a row per method."""
    methods = _harmonized_methods(results)
    figure = _new_figure(0.9 + 2.3 * len(methods))
    quantities = (
        "linear MMD (less: domains nearer)",
        "max J(W) of the source",
        "max J(W) of the target as predicted",
    )
    grid = figure.subplots(len(methods), 3, sharex=True, squeeze=False)
    for axes_row, method in zip(grid, methods, strict=True):
        for place, axes in enumerate(axes_row, start=1):
            for rule in SHOWN:
                values = [
                    [(row[0], row[place]) for row in run.balance]
                    for run in select(results, method, rule)
                ]
                _curve(axes, values, LABELS[rule], COLORS[rule])
            axes.set_ylim(bottom=0)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)
        axes_row[0].set_ylabel(method)
    for axes, quantity in zip(grid[0], quantities, strict=True):
        axes.set_title(quantity, fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("training step")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(
        f"{results[0].config['task']}, features of G: mean over {_seeds(results)}, "
        "band: +- 1 standard deviation",
        fontsize=10,
    )
    return figure


def _sign_flips(results: Sequence[Watched]) -> "Figure":
    """Draw the accuracy of rules and of changed signs, one panel per method."""
    methods = _harmonized_methods(results)
    figure = _new_figure(3.2)
    grid = figure.subplots(1, len(methods), sharex=True, sharey=True, squeeze=False)
    for axes, method in zip(grid[0], methods, strict=True):
        bars = [
            ("source only", "#aaaaaa", select(results, SOURCE_ONLY, "sum")),
            *((LABELS[r], COLORS[r], select(results, method, r)) for r in SHOWN),
            *((FLIP_LABELS[r], "#cc79a7", select(results, method, r)) for r in FLIPS),
        ]
        for place, (_, color, runs) in enumerate(bars):
            found = [run.accuracy for run in runs]
            middle = sum(found) / len(found)
            axes.barh(place, middle, color=color, alpha=0.55)
            axes.plot(found, [place] * len(found), ".", color="black", markersize=4)
            axes.text(max(found) + 2, place, f"{middle:.1f}", va="center", fontsize=8)
        axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=9)
        axes.axvline(100 / CLASSES, color="black", linestyle=":", linewidth=1)
        axes.set_title(method, fontsize=10)
        axes.set_xlabel("target test accuracy (%)")
        axes.set_xlim(0, 100)
    grid[0, 0].invert_yaxis()
    figure.suptitle(
        f"{results[0].config['task']}: the sum with the sign of alignment (g1) or "
        f"classification (g2) changed\n(bar: mean over {_seeds(results)}, dots: seeds, "
        "dotted: chance)",
        fontsize=10,
    )
    return figure


def _lambdas(results: Sequence[Watched]) -> "Figure":
    """Draw what GH++ gains over the sum by lambda, one panel per method."""
    methods = _harmonized_methods(results)
    figure = _new_figure(3.4)
    grid = figure.subplots(1, len(methods), sharex=True, sharey=True, squeeze=False)
    for axes, method in zip(grid[0], methods, strict=True):
        plain = [run.accuracy for run in select(results, method, "sum")]
        gains = torch.tensor(
            [
                [
                    run.accuracy - base
                    for run, base in zip(
                        select(results, method, rule), plain, strict=True
                    )
                ]
                for rule in LAMBDAS.values()
            ]
        )
        for seed in gains.T.tolist():
            axes.plot([*LAMBDAS], seed, ".-", color="#aaaaaa", linewidth=0.8)
        axes.plot([*LAMBDAS], gains.mean(1).tolist(), "o-", color=COLORS["ghpp"])
        axes.axhline(0, color=COLORS["sum"], linestyle="--", linewidth=1)
        axes.set_xticks([*LAMBDAS])
        axes.set_title(f"{method} (sum: {sum(plain) / len(plain):.1f} %)", fontsize=10)
        axes.set_xlabel("lambda: share of the turn that alignment takes")
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("accuracy minus sum (points)")
    figure.suptitle(
        f"{results[0].config['task']}: GH++ by lambda, target test accuracy minus that "
        f"of the sum\n(orange: mean over {_seeds(results)}, grey: each of them)",
        fontsize=10,
    )
    return figure


def _seeds(results: Sequence[Result]) -> str:
    count = len({result.config["seed"] for result in results})
    return f"{count} seed{'s' if count > 1 else ''}"


if __name__ == "__main__":
    main()
