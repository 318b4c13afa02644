"""Runs of the published protocols beside the paper's Table 3."""

from collections.abc import Sequence

from benchmarks.common.statistics import paired_difference
from benchmarks.common.table import lay_out
from benchmarks.uda.methods.published import REFERENCES
from benchmarks.uda.methods.rules import RULES
from benchmarks.uda.runs.published import PublishedRun
from benchmarks.uda.views.compared import by_seed
from benchmarks.uda.views.paper_table import (
    PAPER,
    count,
    difference,
    figure,
    median_of,
    spread,
)

COLUMNS = (
    *("method", "rule", "last step", "selected", "best"),
    *("minus sum [95 %]", "paper"),
)
ANGLES = ("method", "rule", "conflict %", "mean cos", "|g1|/|g2|")

NOTES = """\
MCD, DWL, CDAN+E: as published. MCD-joint: with cross entropy in the generator's step,
  where both losses meet. MCD-heads, DWL-unweighted: with the weights where the GH paper's
  code puts them; their sum is that of MCD, of DWL.
last step: target test accuracy in percent, mean +- standard deviation of (so many) seeds.
  selected: where the error on the source's test set was least. best: where the target's was.
minus sum: of the last step, paired by seed; mean, and from three seeds on its 95 % interval.
conflict, mean cos, |g1|/|g2| (median): of the pair's gradients over the generator, before
  harmonization. Task 1 is alignment, but in MCD-heads cross entropy, beside minus alignment.
paper: Table 3, the best epoch on the target's test set."""


def format_table(runs: Sequence[PublishedRun]) -> str:
    """Lay out a line per method and rule of one task, with as many seeds as there are.

    Below it how the two gradients lay to each other, if there are two.
    """
    rows: list[tuple[str, ...]] = [COLUMNS]
    angles: list[tuple[str, ...]] = [ANGLES]
    for method in REFERENCES:
        for rule in RULES:
            own = by_seed(runs, method, rule, 1.0)
            if own:
                rows.append(_row(runs, method, rule))
                found = own.values()
                if any(run.obtuse is not None for run in found):
                    angles.append(
                        (
                            method,
                            rule,
                            median_of(found, lambda run: run.obtuse, ".0f"),
                            median_of(found, lambda run: run.cosine, "+.3f"),
                            median_of(found, lambda run: run.ratio, ".3f"),
                        )
                    )
    tables = [rows] if len(angles) == 1 else [rows, angles]
    return "\n\n".join(lay_out(one, names=2) for one in tables)


def _row(runs: Sequence[PublishedRun], method: str, rule: str) -> tuple[str, ...]:
    own = by_seed(runs, method, rule, 1.0)
    plain = by_seed(runs, REFERENCES[method], "sum", 1.0)
    pairs = [
        (run.accuracy, plain[seed].accuracy)
        for seed, run in own.items()
        if seed in plain and rule != "sum"
    ]
    paper = PAPER.get((str(runs[0].config["task"]), method.split("-")[0]), {})
    return (
        method,
        rule,
        count([run.accuracy for run in own.values()]),
        spread(run.selected for run in own.values()),
        spread(run.best for run in own.values()),
        difference(paired_difference(*zip(*pairs, strict=True)) if pairs else None),
        figure(paper.get(rule)),
    )
