"""What each rule has more than the sum, paired by seed: for tables and pictures alike."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from benchmarks.common.statistics import Difference, paired_difference
from benchmarks.uda.data import REAL
from benchmarks.uda.methods.rules import ALL_RULES
from benchmarks.uda.methods.steps import ALL_METHODS, SOURCE_ONLY
from benchmarks.uda.runs.records import Run

Tasks: TypeAlias = Mapping[str, Sequence[Run]]
"""Runs by the name of their task, like each other in size, steps and rate."""


@dataclass(frozen=True)
class Compared:
    """A method under a rule at a weight of the alignment loss, on one task.

    Attributes:
        method: its name.
        rule: a key of ``ALL_RULES``.
        weight: of the alignment loss.
        runs: of all seeds.
        pairs: how many of them the difference is of.
        difference: to the sum at the same weight, of the sum at larger weights to that at
            1; None for the sum at 1 itself, and where no seed has both.
    """

    method: str
    rule: str
    weight: float
    runs: list[Run]
    pairs: int
    difference: Difference | None

    @property
    def name(self) -> str:
        """What tables and pictures call the rule."""
        if self.method == SOURCE_ONLY:
            return "-"
        return self.rule if self.weight == 1 else f"{self.rule} x {self.weight:g}"


def compare(runs: Sequence[Run], compared: str = "accuracy") -> list[Compared]:
    """Compare the runs of one task with the sum's, in the order of methods and rules.

    Args:
        runs: of one task, like each other in size, steps and rate.
        compared: what of a run is compared: ``accuracy``, ``selected`` or ``best``.
    """
    weights = sorted({float(str(run.config["trade_off"])) for run in runs})
    found = []
    for method in ALL_METHODS:
        for rule in ALL_RULES:
            for weight in weights:
                own = by_seed(runs, method, rule, weight)
                if own:
                    base = 1.0 if rule == "sum" else weight
                    plain = by_seed(runs, method, "sum", base)
                    pairs = [
                        (getattr(run, compared), getattr(plain[seed], compared))
                        for seed, run in own.items()
                        if seed in plain and not math.isnan(getattr(run, compared))
                    ]
                    if rule == "sum" and weight == 1:
                        pairs = []
                    difference = (
                        paired_difference(*zip(*pairs, strict=True)) if pairs else None
                    )
                    shown = [*own.values()]
                    found.append(
                        Compared(method, rule, weight, shown, len(pairs), difference)
                    )
    return found


def by_seed(
    runs: Iterable[Run], method: str, rule: str, weight: float
) -> dict[object, Run]:
    """Choose the runs of a method, rule and weight."""
    wanted = {"method": method, "rule": rule, "trade_off": weight}
    return {
        run.config["seed"]: run for run in runs if wanted.items() <= run.config.items()
    }


def tasks_of(runs: Sequence[Run], size: int) -> Tasks:
    """Sort runs on the CPU by their task, those of the most usual number of steps.

    Raises:
        ValueError: if there are none of this size.
    """
    own = [one for one in runs if one.config["size"] == size and one.device == "cpu"]
    lengths = [int(str(one.config["steps"])) for one in own]
    if not own:
        raise ValueError(f"the store has no runs of size {size}")
    usual = max(lengths, key=lengths.count)
    return {
        task: found
        for task in REAL
        if (
            found := [
                one
                for one, steps in zip(own, lengths, strict=True)
                if one.config["task"] == task and steps == usual
            ]
        )
    }
