"""What is kept of a run, whole or in numbers, and what tells it apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from benchmarks.common.store import hash_of
from benchmarks.uda.data import SHA256
from benchmarks.uda.methods.gramians import Row, angles, obtuse_share
from benchmarks.uda.methods.steps import Config

CPU = torch.device("cpu")

KEPT = Path(__file__).parents[1] / "table3.jsonl"
"""The committed runs, of Table 3."""

Balance: TypeAlias = tuple[int, float, float, float]
"""Steps done; linear MMD; max J(W) of the source, and of the target as predicted."""

Points: TypeAlias = list[tuple[float, float, int]]
"""What t-SNE made of images: x, y, class."""


@dataclass(frozen=True)
class Result:
    """One run, with every Gramian: what pictures need.

    Attributes:
        config: ``steps.Config.settings``.
        errors: (steps done, target test error in percent), from step 0 to the last.
        before: Gramians of the two gradients over G, one per harmonized update.
        after: the same, harmonized.
        null: Gramians of unrelated gradients (``updates.unrelated_gramians``); runs
            with the rule ``sum`` only.
        validation: (steps done, error on labeled images of the source that are not
            trained on), where there are such images.
        key: :func:`key_of`; made here for lines of old, which have none.
        torch: its version.
        balance: at each evaluation, if the networks were watched.
        confusion: target test images by label (row) and predicted class, after the last
            step, if watched.
        points: of the images of ``"source"`` and ``"target"`` after the last step, if
            these are drawn.
    """

    config: dict[str, Any]
    errors: list[tuple[int, float]]
    before: list[Row]
    after: list[Row]
    null: list[Row]
    validation: list[tuple[int, float]] = field(default_factory=list)
    key: str = ""
    torch: str = ""
    balance: list[Balance] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    points: dict[str, Points] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", _hash(self.config, CPU))

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.config["method"])

    @property
    def rule(self) -> str:
        """Name of the rule."""
        return str(self.config["rule"])

    @property
    def accuracy(self) -> float:
        """Target test accuracy after the last step, in percent."""
        return 100 - self.errors[-1][1]

    @property
    def selected(self) -> float:
        """Target test accuracy where the source validation error is least, the last such.

        No label of the target has a part in the choice. NaN without validation.
        """
        if not self.validation:
            return math.nan
        _, at = min((error, -step) for step, error in self.validation)
        return 100 - dict(self.errors)[-at]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The numbers of one run, without its thousands of Gramians: a table's row needs them.

    Attributes:
        key: hash of the configuration and the data.
        config: ``steps.Config.settings``.
        torch: its version.
        accuracy: on the target's test set after the last step, in percent.
        selected: the same where the source validation error was least; NaN if there was
            no validation.
        errors: (steps done, target test error).
        validation: (steps done, source validation error).
        obtuse: share of obtuse angles over the run, in percent; None with one loss.
        cosine: mean.
        ratio: median of the norms' ratio.
        null: share of obtuse angles of unrelated gradients, in percent; None where they
            were not looked at.
        device: where it was trained.
    """

    key: str
    config: dict[str, object]
    torch: str
    accuracy: float
    selected: float = math.nan
    errors: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    obtuse: float | None = None
    cosine: float | None = None
    ratio: float | None = None
    null: float | None = None
    device: str = "cpu"

    @property
    def best(self) -> float:
        """Target test accuracy at the best evaluation by the target's own labels.

        What the paper's code reports. No user has these labels.
        """
        return 100 - min(error for _, error in self.errors)


def summarize(result: Result, device: torch.device) -> Run:
    """Keep the numbers of a run, not its thousands of Gramians."""
    return Run(
        key=result.key,
        config=result.config,
        torch=result.torch,
        accuracy=result.accuracy,
        selected=result.selected,
        errors=result.errors,
        validation=result.validation,
        **angles(result.before)._asdict(),
        null=100 * obtuse_share(result.null) if result.null else None,
        device=str(device),
    )


def key_of(
    config: Config, device: torch.device = CPU, foreign: Sequence[str] = ()
) -> str:
    """Hash what a run is of: the configuration, the data and the kind of device.

    Devices drop other units, so runs of two of them are no pairs. Not the code, of which
    the constants of the methods are a part: who changes what a method computes raises its
    number in ``steps.REVISIONS``.

    Args:
        config: of the run.
        device: where it is trained.
        foreign: ``Task.foreign`` of its data.
    """
    return _hash(config.settings(), device, foreign)


def _hash(
    settings: dict[str, Any], device: torch.device, foreign: Sequence[str] = ()
) -> str:
    kind = () if device == CPU else (device.type,)
    return hash_of(settings, SHA256, *kind, *foreign)


def select(results: Sequence[Result], method: str, rule: str) -> list[Result]:
    """Return the runs of a method and rule, by seed."""
    chosen = [
        result for result in results if (result.method, result.rule) == (method, rule)
    ]
    return sorted(chosen, key=lambda result: int(result.config["seed"]))


def pool(results: Sequence[Result], field: str) -> list[Row]:
    """Concatenate the Gramians ``before``, ``after`` or ``null`` of several runs."""
    return [row for result in results for row in getattr(result, field)]
