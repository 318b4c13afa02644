"""What the kept runs say of each rule, in counts."""

from statistics import median

from benchmarks.common.table import lay_out
from benchmarks.uda.methods.rules import FLIPS
from benchmarks.uda.methods.steps import ALL_METHODS
from benchmarks.uda.views.compared import Tasks, compare

ENOUGH = 10
"""Seeds of a difference that counts."""

COLUMNS = ("rule", "differences", "above 0", "below 0", "least", "median", "most")


def format_verdict(tasks: Tasks, compared: str = "accuracy") -> str:
    """Count the differences to the sum that the seeds tell from zero, rule by rule.

    Those of ``ENOUGH`` seeds at least, with the least, median and largest mean. And say
    how often a larger weight of the sum gains more than a rule.
    """
    found = [one for runs in tasks.values() for one in compare(runs, compared)]
    rows: list[tuple[str, ...]] = [COLUMNS]
    for name in dict.fromkeys(one.name for one in found if one.rule not in FLIPS):
        own = [
            one.difference
            for one in found
            if one.name == name and one.difference and one.pairs >= ENOUGH
        ]
        if own:
            means = [one.mean for one in own]
            told = [one.mean for one in own if not one.is_noise]
            above = sum(one > 0 for one in told)
            counts = (len(own), above, len(told) - above)
            ends = (min(means), median(means), max(means))
            rows.append((name, *map(str, counts), *(f"{one:+.1f}" for one in ends)))
    more, of = larger_weights(tasks, compared)
    return (
        f"{lay_out(rows)}\n\nThe better of sum x 2 and sum x 4 gains more than the "
        f"better of gh and ghpp in {more} of {of}."
    )


def larger_weights(tasks: Tasks, compared: str = "accuracy") -> tuple[int, int]:
    """Count how often the better larger weight of the sum gains more than the better rule.

    Returns:
        How often it does, and of how many methods and tasks.
    """
    more = of = 0
    for runs in tasks.values():
        means = {
            (one.method, one.name): one.difference.mean
            for one in compare(runs, compared)
            if one.difference and one.pairs >= ENOUGH
        }
        for method in ALL_METHODS:
            weights, rules = (
                [means[method, name] for name in names if (method, name) in means]
                for names in (("sum x 2", "sum x 4"), ("gh", "ghpp"))
            )
            if weights and rules:
                of += 1
                more += max(weights) > max(rules)
    return more, of


def largest_gain(tasks: Tasks) -> str:
    """Name the method and task on which a rule gains most, and what larger weights do.

    Of the differences that count, as in :func:`format_verdict`.

    Raises:
        ValueError: if no rule gains.
    """
    counted = [
        (task, one, one.difference)
        for task, runs in tasks.items()
        for one in compare(runs)
        if one.difference and one.pairs >= ENOUGH
    ]
    gains = [
        each
        for each in counted
        if each[1].rule in ("gh", "ghpp") and each[1].weight == 1 and each[2].low > 0
    ]
    if not gains:
        raise ValueError("the runs show no gain of a rule")
    task, most, gain = max(gains, key=lambda each: each[2].mean)
    weights = ", ".join(
        f"{difference.mean:+.1f} at {one.weight:g} times the weight"
        for name, one, difference in counted
        if (name, one.method, one.rule) == (task, most.method, "sum")
    )
    return (
        f"{most.method} from {task.replace('-', ' to ')} gains {gain.mean:.1f} points with "
        f"{most.rule} ({gain.low:.1f} to {gain.high:.1f}, {most.pairs} paired seeds); "
        f"the sum with a heavier alignment loss: {weights}"
    )
