"""Runs laid out as the paper's Table 3, beside its figures."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, median, stdev

from benchmarks.common.statistics import Difference
from benchmarks.common.table import lay_out
from benchmarks.uda.methods.rules import ALL_RULES, FLIPS
from benchmarks.uda.methods.steps import ALL_METHODS, SOURCE_ONLY
from benchmarks.uda.runs.records import Run
from benchmarks.uda.views.compared import Compared, by_seed, compare

PAPER = {
    ("mnist-usps", "CDAN+E"): {"sum": 95.6, "gh": 96.8, "ghpp": 96.5},
    ("usps-mnist", "CDAN+E"): {"sum": 98.0, "gh": 98.1, "ghpp": 98.3},
    ("svhn-mnist", "CDAN+E"): {"sum": 89.2, "gh": 90.6, "ghpp": 90.7},
    ("mnist-usps", "MCD"): {"sum": 94.2, "gh": 96.7, "ghpp": 97.3},
    ("usps-mnist", "MCD"): {"sum": 94.1, "gh": 96.8, "ghpp": 97.1},
    ("svhn-mnist", "MCD"): {"sum": 96.2, "gh": 97.5, "ghpp": 97.1},
    ("mnist-usps", "DWL"): {"sum": 97.3, "gh": 98.7, "ghpp": 98.9},
    ("usps-mnist", "DWL"): {"sum": 97.4, "gh": 98.5, "ghpp": 98.6},
    ("svhn-mnist", "DWL"): {"sum": 98.1, "gh": 98.8, "ghpp": 99.1},
    ("mnist-usps", "GVB"): {"sum": 96.3, "gh": 96.7, "ghpp": 96.9},
    ("usps-mnist", "GVB"): {"sum": 95.1, "gh": 95.4, "ghpp": 95.5},
    ("svhn-mnist", "GVB"): {"sum": 90.0, "gh": 91.0, "ghpp": 91.7},
    ("mnist-usps", "SSRT"): {"sum": 98.6, "gh": 98.9, "ghpp": 99.2},
    ("usps-mnist", "SSRT"): {"sum": 99.4, "gh": 99.4, "ghpp": 99.5},
    ("svhn-mnist", "SSRT"): {"sum": 99.2, "gh": 99.3, "ghpp": 99.3},
}
"""Accuracies of Table 3, in percent: the best epoch on the target test set.

SSRT's with a ViT-B/16 that had seen ImageNet-21K.
"""

COMPARED = {"accuracy": "last step", "selected": "selected steps"}
"""What of a run can be compared with the sum's, and its name."""

COLUMNS = ("method", "rule", "last step", "selected", "minus sum [95 %]", "paper")
ANGLES = ("method", "rule", "conflict %", "mean cos", "|g1|/|g2|", "null %")

NOTES = """\
last step: target test accuracy in percent after the last step, mean +- standard deviation
  of (so many) seeds. selected: where the error on the source's test set was least; no
  label of the target has a part in it.
minus sum: of the {compared}, paired by seed, the sum at the same weight of the alignment
  loss (sum x 2 and x 4: minus the sum x 1); mean, and from three seeds on the 95 %
  interval of Student's t.
conflict, mean cos, |g1|/|g2| (median): of alignment (1) and classification (2) over the
  generator, before harmonization, over all updates. null: share of obtuse angles of the
  same gradients with random signs.
paper: Table 3, best epoch on the target's test set, each method in a setting of its own
  (MCD: 28x28, 50 000 steps; SSRT: a ViT-B/16 that had seen ImageNet-21K, where ours is
  small and starts at random)."""


def format_table(runs: Sequence[Run], compared: str = "accuracy") -> str:
    """Lay out a line per method and rule of one task, with as many seeds as there are.

    ``compared`` is the field that is compared with the sum's: a key of ``COMPARED``.
    """
    return lay_out([COLUMNS, *map(_row, compare(runs, compared))], names=2)


def format_angles(runs: Sequence[Run]) -> str:
    """Lay out how the two gradients lay to each other, a line per method and rule."""
    rows = [_angles(one) for one in compare(runs) if one.method != SOURCE_ONLY]
    return lay_out([ANGLES, *rows], names=2)


def format_layout(tasks: Mapping[str, Sequence[Run]]) -> str:
    """Lay out the runs of several tasks as the paper's Table 3 does, beside its figures.

    Accuracies after the last step, mean +- standard deviation (number of seeds); the
    mean over the tasks where all have runs. Of the rules at a weight of 1 that change no
    sign.
    """
    heads = [head for name in tasks for head in (name, "paper")]
    rows: list[tuple[str, ...]] = [("method", "rule", *heads, "mean", "paper")]
    for method in ALL_METHODS:
        for rule in (one for one in ALL_RULES if one not in FLIPS):
            found = [by_seed(runs, method, rule, 1.0) for runs in tasks.values()]
            if any(found):
                values = [[run.accuracy for run in own.values()] for own in found]
                paper = [PAPER.get((name, method), {}).get(rule) for name in tasks]
                means = [mean(own) if own else None for own in values]
                cells = [
                    cell
                    for own, theirs in zip(values, paper, strict=True)
                    for cell in (count(own), figure(theirs))
                ]
                name = "-" if method == SOURCE_ONLY else rule
                last = [figure(_mean_of_all(one)) for one in (means, paper)]
                rows.append((method, name, *cells, *last))
    return lay_out(rows, names=2)


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    known = [one for one in values if one is not None]
    return mean(known) if len(known) == len(values) else None


def figure(value: float | None) -> str:
    """Write a figure of the paper, or that there is none."""
    return "-" if value is None else f"{value:.1f}"


def describe_oracle(runs: Sequence[Run]) -> str:
    """Say what the paper's choice of the step, by the labels of the target, would add."""
    gains = [run.best - run.accuracy for run in runs]
    return (
        "The best step by the target's own test labels, as in the paper,\nwould add "
        f"{mean(gains):.1f} points in the mean, {max(gains):.1f} at most."
    )


def _row(one: Compared) -> tuple[str, ...]:
    task = str(one.runs[0].config["task"])
    paper = PAPER.get((task, one.method), {}).get(one.rule if one.weight == 1 else "")
    return (
        one.method,
        one.name,
        count([run.accuracy for run in one.runs]),
        spread(run.selected for run in one.runs),
        difference(one.difference),
        figure(paper),
    )


def _angles(one: Compared) -> tuple[str, ...]:
    return (
        one.method,
        one.name,
        median_of(one.runs, lambda run: run.obtuse, ".0f"),
        median_of(one.runs, lambda run: run.cosine, "+.3f"),
        median_of(one.runs, lambda run: run.ratio, ".3f"),
        median_of(one.runs, lambda run: run.null, ".0f"),
    )


def count(values: Sequence[float]) -> str:
    """Write mean +- standard deviation (number)."""
    return f"{spread(values)} ({len(values)})" if values else "-"


def spread(values: Iterable[float]) -> str:
    """Write mean +- standard deviation of the values that are not NaN."""
    found = [value for value in values if not math.isnan(value)]
    if not found:  # no validation
        return "-"
    return f"{mean(found):.1f}" + (f" +- {stdev(found):.1f}" if len(found) > 1 else "")


def difference(found: Difference | None) -> str:
    """Write a paired difference [95 % interval], from three pairs on."""
    if found is None:
        return "-"
    if not math.isfinite(found.margin):
        return f"{found.mean:+.1f}"
    return f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def median_of(
    runs: Iterable[Run], value: Callable[[Run], float | None], form: str
) -> str:
    """Write the median of what the runs that have it have."""
    found = [one for one in map(value, runs) if one is not None]
    if any(map(math.isnan, found)):  # which have no order
        return format(math.nan, form)
    return format(median(found), form) if found else "-"
