"""What runs leave behind, on disk and as statistics over seeds."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Keyed(Protocol):
    """Something with a key."""

    @property
    def key(self) -> str:
        """Tell it from others."""
        ...


KeyedT = TypeVar("KeyedT", bound=Keyed)

Row: TypeAlias = tuple[float, float, float]
"""A Gramian of two tasks: g1.g1, g1.g2 and g2.g2."""

Balance: TypeAlias = tuple[int, float, float, float]
"""Steps done; linear MMD; max J(W) of the source, and of the target as predicted."""

Points: TypeAlias = list[tuple[float, float, int]]
"""What t-SNE made of images: x, y, class."""

# Cosines nearer to 0 than this are 0: GH++ makes orthogonal gradients, up to rounding.
ORTHOGONAL = 1e-9


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        config: ``steps.Config.settings``.
        errors: (steps done, target test error in percent), from step 0 to the last.
        before: Gramians of the two gradients over G, one per harmonized update.
        after: the same, harmonized.
        null: Gramians of unrelated gradients (``updates.unrelated_gramians``); runs
            with the rule ``sum`` only.
        validation: (steps done, error on labeled images of the source that are not
            trained on), where there are such images.
    """

    config: dict[str, Any]
    errors: list[tuple[int, float]]
    before: list[Row]
    after: list[Row]
    null: list[Row]
    validation: list[tuple[int, float]] = field(default_factory=list)

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


@dataclass(frozen=True)
class Watched(Result):
    """One run, with what the figures need to know of its networks.

    Attributes:
        key: hash of the configuration and the data.
        torch: its version.
        balance: at each evaluation.
        confusion: target test images by label (row) and predicted class, after the last
            step.
        points: of the images of ``"source"`` and ``"target"`` after the last step; empty
            for runs that are not drawn.
    """

    key: str = ""
    torch: str = ""
    balance: list[Balance] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    points: dict[str, Points] = field(default_factory=dict)


ResultT = TypeVar("ResultT", bound=Result)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The numbers of one run, without its thousands of Gramians: a table's row needs them.

    Attributes:
        key: hash of the configuration and the data.
        config: ``steps.Config.settings``.
        torch: its version.
        accuracy: on the target's test set after the last step, in percent.
        selected: the same where the source validation error was least; NaN if there was
            no validation.
        obtuse: share of obtuse angles over the run, in percent; None with one loss.
        cosine: mean.
        ratio: median of the norms' ratio.
        null: share of obtuse angles of unrelated gradients, in percent; None where they
            were not looked at.
    """

    key: str
    config: dict[str, object]
    torch: str
    accuracy: float
    selected: float = math.nan
    obtuse: float | None = None
    cosine: float | None = None
    ratio: float | None = None
    null: float | None = None


class Angles(NamedTuple):
    """How two gradients lay to each other over a run: see :class:`Kept`."""

    obtuse: float | None = None
    cosine: float | None = None
    ratio: float | None = None


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write one JSON object per line and run."""
    lines = (json.dumps(asdict(result)) for result in results)
    path.write_text("".join(f"{line}\n" for line in lines))


def read_results(path: Path) -> list[Result]:
    """Read what :func:`write_results` wrote, with lists in place of tuples."""
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()]


def append_line(store: Path, run: "DataclassInstance") -> None:
    """Write one more line, after what is left of one that was not finished."""
    with store.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(f"{json.dumps(asdict(run))}\n".encode())


def read_runs(store: Path, make: Callable[..., KeyedT]) -> dict[str, KeyedT]:
    """Read what :func:`append_line` wrote, by key; an unfinished last line is none.

    Raises:
        ValueError: if another line is not one of a run.
    """
    if not store.exists():
        return {}
    runs = {}
    lines = store.read_text().split("\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            run = make(**json.loads(line))
            runs[run.key] = run
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"store must hold runs, got {store} with {error!r} in its line {number}"
            ) from error
    return runs


def hash_of(*parts: object) -> str:
    """Hash what JSON can write: a key."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def select(results: Sequence[ResultT], method: str, rule: str) -> list[ResultT]:
    """Return the runs of a method and rule, by seed."""
    chosen = [
        result for result in results if (result.method, result.rule) == (method, rule)
    ]
    return sorted(chosen, key=lambda result: int(result.config["seed"]))


def cosines(rows: Sequence[Row]) -> Tensor:
    """Cosines of pairs of gradients, float64 ``[n]``; 0 where a gradient is zero."""
    gramians = torch.tensor(rows, dtype=torch.float64).view(-1, 3)
    norms = gramians[:, 0].sqrt() * gramians[:, 2].sqrt()
    return torch.where(norms == 0, 0, gramians[:, 1] / norms.where(norms != 0, 1))


def norm_ratios(rows: Sequence[Row]) -> Tensor:
    """Norm of g1 divided by that of g2, float64 ``[n]``."""
    gramians = torch.tensor(rows, dtype=torch.float64).view(-1, 3)
    return gramians[:, 0].sqrt() / gramians[:, 2].sqrt()


def obtuse_share(rows: Sequence[Row]) -> float:
    """Share of pairs at an obtuse angle, in [0, 1]; NaN without pairs.

    NaN, too, if a gradient is not finite: such a pair has no angle.
    """
    found = cosines(rows)
    return float(
        (found < -ORTHOGONAL).double().where(found.isfinite(), math.nan).mean()
    )


def angles(rows: Sequence[Row]) -> Angles:
    """Sum up a run's Gramians; nothing without any."""
    if not rows:
        return Angles()
    return Angles(
        100 * obtuse_share(rows),
        float(cosines(rows).mean()),
        float(norm_ratios(rows).quantile(0.5)),
    )


def pool(results: Sequence[Result], field: str) -> list[Row]:
    """Concatenate the Gramians ``before``, ``after`` or ``null`` of several runs."""
    return [row for result in results for row in getattr(result, field)]
