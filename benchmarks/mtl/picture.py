"""Draw the rules at their best: each in its best cell, on the seeds that compare.

A dot is a training, a line the mean of ten. Beside it stands what the mean has more than
that of the plain sum, paired by seed, with its 95 % margin; bold where it is free of zero.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from benchmarks.common.options import add_store
from benchmarks.common.picture import save
from benchmarks.common.statistics import paired_difference
from benchmarks.common.store import read_runs
from benchmarks.mtl.problems import PROBLEMS
from benchmarks.mtl.tuning import CONTENDERS, STORE, Run, at_best, whole_cells
from ghopt.extras import from_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUM = "sum"
# Colors that color-blind readers can tell apart (Okabe and Ito).
_PLAIN, _RESTART, _GH = "#555555", "#E69F00", "#0072B2"


def draw(known: Mapping[str, Run]) -> "Figure":
    """Draw a panel for each problem of which every contender has all runs.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if there is no such problem.
    """
    with from_extra("bench"):
        from matplotlib.figure import Figure
    found = {
        problem: at_best(known, problem, whole_cells(known, problem))
        for problem in dict.fromkeys(run.problem for run in known.values())
    }
    whole = {name: best for name, best in found.items() if len(best) == len(CONTENDERS)}
    if not whole:
        raise ValueError("runs must be whole for one problem, got none")
    figure = Figure(figsize=(11, 0.3 * len(CONTENDERS) + 1), layout="constrained")
    panels = figure.subplots(1, len(whole), sharey=True, squeeze=False)[0]
    for axes, (problem, best) in zip(panels, whole.items(), strict=True):
        _draw(axes, problem, {name: figures for name, (_, figures) in best.items()})
    panels[0].set_yticks(range(len(CONTENDERS)), [*CONTENDERS])
    panels[0].invert_yaxis()
    return figure


def _draw(axes: "Axes", problem: str, figures: Mapping[str, Sequence[float]]) -> None:
    """Draw the trainings of one problem, a row for each contender."""
    metric = PROBLEMS[problem].metrics[0]
    for place, (name, values) in enumerate(figures.items()):
        color = _color(name)
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.35, ms=4)
        axes.plot([mean(values)], [place], "|", color=color, ms=14, mew=2.5)
        if name == SUM:
            continue
        more = paired_difference(values, figures[SUM])
        axes.text(
            1.02,
            place,
            f"{more.mean:+{metric.form}} \u00b1 {more.margin:{metric.form}}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=7.5,
            weight="normal" if more.is_noise else "bold",
        )
    better = "more is better" if metric.more_is_better else "less is better"
    axes.set_title(problem, fontsize=9, loc="left", weight="bold")
    axes.set_xlabel(f"{metric.name}, {better}", fontsize=8)
    if not metric.more_is_better:  # errors, which differ by powers of ten
        _take_logarithms(axes)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)


def _take_logarithms(axes: "Axes") -> None:
    """Make the axis logarithmic, with plain numbers, and not too many."""
    with from_extra("bench"):
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high < 100 * low else (1,)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _color(name: str) -> str:
    """Tell the plain sum, the restart of momentum, which knows no tasks, and the rest."""
    contender = CONTENDERS[name]
    if not contender.in_one:
        return _GH
    return _RESTART if contender.projects else _PLAIN


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command: read the runs, and write the picture."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.mtl.picture", description=__doc__
    )
    parser.add_argument("picture", type=Path, help="a file, as .svg or .png")
    add_store(parser, STORE)
    options = parser.parse_args(arguments)
    save(draw(read_runs(options.store, Run)), options.picture)


if __name__ == "__main__":
    main()
