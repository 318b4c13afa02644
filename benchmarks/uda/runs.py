"""The runs of Table 3: which there are, what is kept of one, and what tells it apart."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.uda.data import SHA256
from benchmarks.uda.methods.steps import SOURCE_ONLY, Config
from benchmarks.uda.results import Kept, Result, angles, hash_of, obtuse_share

CPU = torch.device("cpu")

WEIGHTS = (1.0, 2.0, 4.0)
"""Of the alignment loss in the plain sum: the control for rules that re-weigh tasks."""


@dataclass(frozen=True, kw_only=True)
class Run(Kept):
    """What is kept of one run.

    Attributes:
        errors: (steps done, target test error).
        validation: (steps done, source validation error).
        device: where it was trained.
    """

    errors: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    device: str = "cpu"


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


def summarize(result: Result, device: torch.device) -> Run:
    """Keep the numbers of a run, not its thousands of Gramians."""
    return Run(
        key=_hash(result.config, device),
        config=result.config,
        torch=torch.__version__,
        accuracy=result.accuracy,
        selected=result.selected,
        errors=result.errors,
        validation=result.validation,
        **angles(result.before)._asdict(),
        null=100 * obtuse_share(result.null) if result.null else None,
        device=str(device),
    )


def key_of(config: Config, device: torch.device = CPU) -> str:
    """Hash what a run is of: the configuration, the data and the kind of device.

    Devices drop other units, so runs of two of them are no pairs. Not the code, of which
    the constants of the methods are a part: who changes what a method computes raises its
    number in ``steps.REVISIONS``.
    """
    return _hash(config.settings(), device)


def _hash(settings: dict[str, object], device: torch.device) -> str:
    kind = () if device == CPU else (device.type,)
    return hash_of(settings, SHA256, *kind)
