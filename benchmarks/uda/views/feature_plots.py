"""Pictures of watched runs: figures 8, 10, 11, 13 and 14 of the paper."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.uda.methods.networks import CLASSES
from benchmarks.uda.methods.rules import FLIPS, LAMBDAS
from benchmarks.uda.methods.steps import SOURCE_ONLY
from benchmarks.uda.runs.records import Result, select
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

SHOWN = ("sum", "gh", "ghpp")
"""Rules whose features are drawn."""
FLIP_LABELS = {"minus_alignment": "-g1, +g2", "minus_classification": "+g1, -g2"}
SOURCE, TARGET = "#d55e00", "#0072b2"


def draw_watched(results: Sequence[Result], directory: Path) -> list[Path]:
    """Write the plots of watched runs to ``directory`` and return their paths.

    Raises:
        ImportError: if matplotlib is missing.
    """
    return save_all(make_watched_figures(results), directory)


def make_watched_figures(results: Sequence[Result]) -> dict[str, "Figure"]:
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


def _embeddings(results: Sequence[Result]) -> "Figure":
    """Draw the features of both domains by t-SNE, methods by rules."""
    methods = methods_of(results)
    figure = new_figure(0.8 + 3 * len(methods))
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


def _name_classes(axes: "Axes", run: Result) -> None:
    points = torch.tensor(run.points["source"])
    for label in {label for _, _, label in run.points["source"]}:
        x, y = points[points[:, 2] == label, :2].median(0).values.tolist()
        box = {"boxstyle": "circle,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8}
        axes.text(x, y, str(label), ha="center", va="center", fontsize=8, bbox=box)


def _confusions(results: Sequence[Result]) -> "Figure":
    """Draw the confusion matrices of the target's test set, methods by rules."""
    methods = methods_of(results)
    figure = new_figure(0.8 + 3.1 * len(methods))
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
        f"the row\n(below 5 left out; {count_seeds(results)})",
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


def _balances(results: Sequence[Result]) -> "Figure":
    """Draw MMD and max J(W) over training, a row per method."""
    methods = methods_of(results)
    figure = new_figure(0.9 + 2.3 * len(methods))
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
                draw_curve(axes, values, LABELS[rule], COLORS[rule])
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
        f"{results[0].config['task']}, features of G: mean over {count_seeds(results)}, "
        "band: +- 1 standard deviation",
        fontsize=10,
    )
    return figure


def _sign_flips(results: Sequence[Result]) -> "Figure":
    """Draw the accuracy of rules and of changed signs, one panel per method."""
    methods = methods_of(results)
    figure = new_figure(3.2)
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
        f"classification (g2) changed\n(bar: mean over {count_seeds(results)}, dots: seeds, "
        "dotted: chance)",
        fontsize=10,
    )
    return figure


def _lambdas(results: Sequence[Result]) -> "Figure":
    """Draw what GH++ gains over the sum by lambda, one panel per method."""
    methods = methods_of(results)
    figure = new_figure(3.4)
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
        f"of the sum\n(orange: mean over {count_seeds(results)}, grey: each of them)",
        fontsize=10,
    )
    return figure
