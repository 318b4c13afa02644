"""Which runs there are."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from benchmarks.uda.methods.steps import SOURCE_ONLY, Config

WEIGHTS = (1.0, 2.0, 4.0)
"""Of the alignment loss in the plain sum: the control for rules that re-weigh tasks."""


def make_configs(
    like: Config,
    methods: Iterable[str],
    rules: Iterable[str],
    seeds: int,
    weights: Sequence[float] | None = None,
) -> list[Config]:
    """List the runs: seed by seed, so that what is there is always paired.

    Args:
        like: what they have in common.
        methods: of every seed.
        rules: of every method that has two losses.
        seeds: how many.
        weights: of the alignment loss, for each rule; None: 1, and ``WEIGHTS`` in the
            plain sum.
    """
    rules = list(rules)

    def weights_of(method: str, rule: str) -> Sequence[float]:
        if method == SOURCE_ONLY:
            return (1.0,)
        return weights or (WEIGHTS if rule == "sum" else (1.0,))

    return [
        replace(like, method=method, rule=rule, seed=seed, trade_off=weight)
        for seed in range(seeds)
        for method in methods
        for rule in (["sum"] if method == SOURCE_ONLY else rules)
        for weight in weights_of(method, rule)
    ]
