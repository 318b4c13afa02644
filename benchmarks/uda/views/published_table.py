"""Runs of the published protocols beside the paper's Table 3."""

from collections.abc import Sequence

from benchmarks.common.table import lay_out
from benchmarks.uda.methods.published import REFERENCES
from benchmarks.uda.methods.rules import RULES
from benchmarks.uda.runs.published import PublishedRun
from benchmarks.uda.views.paper_table import (
    PAPER,
    count,
    difference,
    figure,
    median_of,
    spread,
)

COLUMNS = (
    "method",
    "rule",
    "last step",
    "selected",
    "best",
    "minus sum [95 %]",
    "conf. %",
    "cos",
    "ratio",
    "paper",
)

NOTES = """\
MCD, DWL: as published. MCD-joint: with cross entropy in the generator's step, where both
  losses meet. MCD-heads, DWL-unweighted: with the weights where the GH paper's code puts
  them; their sum is that of MCD, of DWL.
last step: target test accuracy in percent, mean +- standard deviation of (so many) seeds.
  selected: where the error on the source's test set was least. best: where the target's was.
minus sum: of the last step, paired by seed; mean, and from three seeds on its 95 % interval.
conf., cos, ratio: share of obtuse angles of the pair's gradients over the generator, their
  mean cosine, the median of their norms' ratio, task 1 over task 2.
paper: Table 3, the best epoch on the target's test set."""


def format_table(runs: Sequence[PublishedRun]) -> str:
    """Lay out a line per method and rule of one task, with as many seeds as there are."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for method in REFERENCES:
        for rule in RULES:
            own = _by_seed(runs, method, rule)
            if own:
                plain = _by_seed(runs, REFERENCES[method], "sum")
                rows.append(_row(method, rule, own, plain))
    return lay_out(rows, names=2)


def _by_seed(
    runs: Sequence[PublishedRun], method: str, rule: str
) -> dict[object, PublishedRun]:
    wanted = {"method": method, "rule": rule}
    return {
        run.config["seed"]: run for run in runs if wanted.items() <= run.config.items()
    }


def _row(
    method: str,
    rule: str,
    own: dict[object, PublishedRun],
    plain: dict[object, PublishedRun],
) -> tuple[str, ...]:
    pairs = [
        (run.accuracy, plain[seed].accuracy)
        for seed, run in own.items()
        if seed in plain
    ]
    found = list(own.values())
    paper = PAPER.get((str(found[0].config["task"]), method.split("-")[0]), {})
    return (
        method,
        rule,
        count([run.accuracy for run in found]),
        spread(run.selected for run in found),
        spread(run.best for run in found),
        "-" if rule == "sum" or not pairs else difference(pairs),
        median_of(found, lambda run: run.obtuse, ".0f"),
        median_of(found, lambda run: run.cosine, "+.3f"),
        median_of(found, lambda run: run.ratio, ".3f"),
        figure(paper.get(rule)),
    )
