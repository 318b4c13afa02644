"""The table of a set of runs, and what may be concluded from it."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from benchmarks.common.statistics import (
    FEWEST_SEEDS,
    Difference,
    paired_difference,
)
from benchmarks.common.table import lay_out
from benchmarks.uda.methods.gramians import cosines, norm_ratios, obtuse_share
from benchmarks.uda.methods.rules import RULES
from benchmarks.uda.runs.records import Result, pool, select

COLUMNS = (
    "method",
    "rule",
    "target acc. %",
    "minus sum",
    "conflict %",
    "mean cos",
    "|g1|/|g2|",
    "time",
)

NOTES = """\
target acc.: after the last step, mean +- standard deviation over {seeds}.
minus sum: difference to the sum of the same seed, mean +- standard error, in points.
conflict, mean cos, |g1|/|g2| (median): of the gradients of alignment (1) and
  classification (2) over the generator, before harmonization, over all updates.
time: CPU time of a training step over that of the plain sum without ghopt."""

Ratios = Mapping[str, Mapping[str, float]]
"""Time ratio by method and rule."""


def format_table(results: Sequence[Result], ratios: Ratios) -> str:
    """Lay out one line per method and rule, in the order of the runs' methods.

    Args:
        results: any number of seeds, the same for every method and rule.
        ratios: what ``cost.time_ratios`` returned, per method.
    """
    methods = dict.fromkeys(result.method for result in results)
    rows = [
        _row(results, method, rule, ratios)
        for method in methods
        for rule in RULES
        if select(results, method, rule)
    ]
    return lay_out((COLUMNS, *rows), names=2)


def format_notes(results: Sequence[Result]) -> str:
    """Say what the columns of :func:`format_table` are."""
    seeds = len({result.config["seed"] for result in results})
    return NOTES.format(seeds=f"{seeds} seed{'s' if seeds > 1 else ''}")


def differences(results: Sequence[Result]) -> dict[tuple[str, str], Difference]:
    """Every rule's paired difference to the sum, by method and rule."""
    return {
        (method, rule): paired_difference(
            _accuracies(results, method, rule), _accuracies(results, method, "sum")
        )
        for method, rule in dict.fromkeys((one.method, one.rule) for one in results)
        if rule != "sum"
    }


def verdict(results: Sequence[Result]) -> str:
    """Say in words which differences to the sum are more than noise.

    A difference counts if it exceeds its 95 % margin (:class:`statistics.Difference`).
    No correction for the number of comparisons is made; the text says how many of
    them chance alone lets through.
    """
    compared = differences(results)
    seeds = len({result.config["seed"] for result in results})
    if seeds < FEWEST_SEEDS:
        return (
            f"Below {FEWEST_SEEDS} seeds no difference to the sum can be told from "
            "noise. No rule is shown to help on this data."
        )
    real = {key: value for key, value in compared.items() if not value.is_noise}
    gains = [_gain(*key, value) for key, value in real.items() if value.mean > 0]
    losses = [_gain(*key, value) for key, value in real.items() if value.mean < 0]
    margins = [value.margin for value in compared.values()]
    noise = (
        f"Noise: {len(compared) - len(real)} of {len(compared)} differences to the sum "
        f"are within what {seeds} seeds cannot tell from 0 (95 %, Student's t: "
        f"+-{min(margins):.1f} to +-{max(margins):.1f} points by row)."
    )
    lines = [noise]
    if real:
        lines.append(
            f"Beyond noise: {', '.join(gains + losses)}; of {len(compared)} "
            f"comparisons chance alone lets {len(compared) / 20:.1g} through."
        )
    if gains:
        lines.append(
            "Rules also scale up the weaker task: before a gain is put down to removed "
            "conflict, compare with the sum at a larger trade-off."
        )
    else:
        lines.append("No rule is shown to help on this data.")
    return "\n".join(lines)


def _gain(method: str, rule: str, difference: Difference) -> str:
    return f"{method} {rule} {difference.mean:+.1f}"


def _accuracies(results: Sequence[Result], method: str, rule: str) -> list[float]:
    return [result.accuracy for result in select(results, method, rule)]


def _row(
    results: Sequence[Result], method: str, rule: str, ratios: Ratios
) -> tuple[str, ...]:
    accuracies = _accuracies(results, method, rule)
    spread = stdev(accuracies) if len(accuracies) > 1 else math.nan
    accuracy = _with_spread(f"{mean(accuracies):.1f}", spread)
    rows = pool(select(results, method, rule), "before")
    if not rows:  # one loss, no pair
        return method, "-", accuracy, "-", "-", "-", "-", "-"
    difference, ratio = "-", "1"
    if rule != "sum":
        compared = paired_difference(accuracies, _accuracies(results, method, "sum"))
        difference = _with_spread(f"{compared.mean:+.1f}", compared.error)
        ratio = f"{ratios[method][rule]:.2f}"
    return (
        method,
        rule,
        accuracy,
        difference,
        f"{100 * obtuse_share(rows):.0f}",
        f"{float(cosines(rows).mean()):+.3f}",
        f"{float(norm_ratios(rows).quantile(0.5)):.3f}",
        ratio,
    )


def _with_spread(number: str, spread: float) -> str:
    return number if math.isnan(spread) else f"{number} +- {spread:.1f}"
