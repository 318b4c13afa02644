"""Results as a table and in words."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from benchmarks.common.statistics import (
    FEWEST_SEEDS,
    Difference,
    paired_difference,
)
from benchmarks.common.table import lay_out
from benchmarks.mtl.problem import Metric, Problem
from benchmarks.mtl.train import Result

NOTES = """\
Metrics: after the last step, mean +- standard deviation over the seeds.
minus sum: difference to the sum of the same seed, mean +- standard error.
obtuse %, cosine: of all pairs of task gradients over the shared parameters, before
  harmonization, at all steps.
opposed %: share of the tasks, over all steps, whose loss the weighted sum of the gradients
  raises to first order (before the optimizer makes its step of it).
by step %: the same for the step that the optimizer made.
same bits: seeds whose parameters are at the end those of the sum, bit by bit.
time: CPU time of a training step over that of the plain sum without ghopt."""


class Compared(NamedTuple):
    """A rule's paired difference to the sum in one metric of one problem."""

    problem: str
    rule: str
    metric: Metric
    difference: Difference

    @property
    def is_gain(self) -> bool:
        """Whether the rule is better than the sum, be it by noise."""
        return (self.difference.mean > 0) == self.metric.more_is_better


def format_problem(
    problem: Problem, results: Sequence[Result], ratios: Mapping[str, float]
) -> str:
    """Lay out the results of one problem, one line per rule, in the order of the runs.

    Metrics that are no headline follow in a table of their own.

    Args:
        problem: that was run.
        results: of this problem; the same seeds for every rule, the sum among them.
        ratios: time ratio by rule, but for the sum.
    """
    rules = list(dict.fromkeys(one.rule for one in results))
    headlines = [metric for metric in problem.metrics if metric.headline]
    header = ["rule"]
    for metric in headlines:
        header += [metric.name, "minus sum"]
    header += ["obtuse %", "cosine", "opposed %", "by step %", "same bits", "time"]
    rows = [_row(results, rule, headlines, ratios) for rule in rules]
    seeds, steps = len({one.seed for one in results}), results[0].steps
    counts = f"{_count(seeds, 'seed')}, {_count(steps, 'step')}"
    names = ", ".join(problem.tasks)
    title = (
        f"{problem.name}: {problem.title}\n"
        f"{len(problem.tasks)} tasks ({names}); {counts}"
    )
    text = f"{title}\n\n{lay_out([header, *rows])}"
    others = [metric for metric in problem.metrics if not metric.headline]
    if others:
        details = [
            [
                metric.name,
                *(_mean(_values(results, rule, metric), metric) for rule in rules),
            ]
            for metric in others
        ]
        text += f"\n\n{lay_out([['metric', *rules], *details])}"
    return text


def compare(problem: Problem, results: Sequence[Result]) -> list[Compared]:
    """Compare every other rule with the sum in every headline metric."""
    rules = dict.fromkeys(one.rule for one in results if one.rule != "sum")
    return [
        Compared(problem.name, rule, metric, _difference(results, rule, metric))
        for rule in rules
        for metric in problem.metrics
        if metric.headline
    ]


def verdict(compared: Sequence[Compared], seeds: int) -> str:
    """Say in words which differences to the sum are more than noise.

    A difference counts if it exceeds its 95 % margin; no correction for the number of
    comparisons is made, the text says how many chance alone lets through.
    """
    if not compared:
        return "Only the sum was run: nothing to compare."
    if seeds < FEWEST_SEEDS:
        return f"Below {FEWEST_SEEDS} seeds no difference to the sum can be told from noise."
    real = [one for one in compared if not one.difference.is_noise]
    noise = (
        f"{len(compared) - len(real)} of {len(compared)} differences to the sum are "
        f"within what {seeds} seeds cannot tell from 0 (95 %, Student's t);"
    )
    lines = [noise, f"chance alone would put {len(compared) / 20:.1g} beyond it."]
    for word, chosen in (
        ("Better", [one for one in real if one.is_gain]),
        ("Worse", [one for one in real if not one.is_gain]),
    ):
        lines += [f"{word} than the sum:" if chosen else f"{word} than the sum: none."]
        lines += [f"  {_in_words(one)}" for one in chosen]
    return "\n".join(lines)


def _row(
    results: Sequence[Result],
    rule: str,
    metrics: Sequence[Metric],
    ratios: Mapping[str, float],
) -> list[str]:
    chosen = _select(results, rule)
    row = [rule]
    for metric in metrics:
        values = _values(results, rule, metric)
        spread = stdev(values) if len(values) > 1 else math.nan
        row.append(_with_spread(_mean(values, metric), spread, metric))
        if rule == "sum":
            row.append("-")
        else:
            found = _difference(results, rule, metric)
            number = format(found.mean, f"+{metric.form}")
            row.append(_with_spread(number, found.error, metric))
    plain = {one.seed: one.parameters for one in _select(results, "sum")}
    same = sum(one.parameters == plain[one.seed] for one in chosen)
    return [
        *row,
        f"{mean(one.conflict.obtuse for one in chosen):.1f}",
        f"{mean(one.conflict.cosine for one in chosen):+.3f}",
        f"{mean(one.conflict.opposed for one in chosen):.1f}",
        f"{mean(one.conflict.set_back for one in chosen):.1f}",
        "-" if rule == "sum" else f"{same}/{len(chosen)}",
        "1" if rule == "sum" else f"{ratios[rule]:.2f}",
    ]


def _difference(results: Sequence[Result], rule: str, metric: Metric) -> Difference:
    return paired_difference(
        _values(results, rule, metric), _values(results, "sum", metric)
    )


def _select(results: Sequence[Result], rule: str) -> list[Result]:
    """Runs of a rule by seed."""
    chosen = [one for one in results if one.rule == rule]
    return sorted(chosen, key=lambda one: one.seed)


def _values(results: Sequence[Result], rule: str, metric: Metric) -> list[float]:
    return [one.metrics[metric.name] for one in _select(results, rule)]


def _mean(values: Sequence[float], metric: Metric) -> str:
    return format(mean(values), metric.form)


def _with_spread(number: str, spread: float, metric: Metric) -> str:
    return number if math.isnan(spread) else f"{number} +- {spread:{metric.form}}"


def _in_words(one: Compared) -> str:
    mean_, margin = one.difference.mean, one.difference.margin
    form = one.metric.form
    change = f"{one.metric.name} {mean_:+{form}} (margin {margin:{form}})"
    return f"{one.problem}, {one.rule}: {change}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
