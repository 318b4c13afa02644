"""A recording: what n steps found and did, and every statistic that follows from it.

Gradients are recorded as ``backward`` gets them: under loss scaling, norms, inner products
and what follows from them are those of the scaled losses. Cosines and weights do not depend
on it.
"""

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import combinations, compress, groupby
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ghopt.geometry import cosines
from ghopt.lines import Step, append_lines, read_steps

_MOST_ROWS = 30


class Logger(Protocol):
    """Whatever takes a dictionary of numbers: a run of Weights & Biases, say."""

    def log(self, data: dict[str, float], /) -> object:
        """Take the numbers of one step."""


class ScalarWriter(Protocol):
    """What :class:`torch.utils.tensorboard.SummaryWriter` is."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Take one number of one step."""


@dataclass(frozen=True)
class Recording:
    """What n steps found and did, on the CPU. A task without part in a step is NaN there.

    Attributes:
        names: of the tasks, K in all.
        steps: numbers of the steps, shape ``[n]``, int64: how many were recorded before.
        gramians: inner products of the task gradients, ``[n, K, K]``, float64.
        weights: of the task gradients in the update (tau), ``[n, K]``, float64.
        rates: learning rates, ``[n]``, float64; NaN where unknown.
        layers: the inner products over each layer alone, ``[n, K, K]``, by its name; NaN
            in steps that it was not recorded in.
        present: which tasks had part in each step, ``[n, K]``, bool.
        step_slopes: what the step taken added to each loss, to first order, ``[n, K]``:
            inner products of the change of the parameters and the task gradients. NaN
            where the step was not recorded.
        step_cosines: cosines of these, ``[n, K]``.
        step_limits: cosines above which more than the rounding of the parameters opposed a
            task, ``[n, K]``.
        rules: names of the weightings, n of them, "" where unknown.
        at_features: whether the inner products of a step are those of the gradients at
            ``features``, ``[n]``, bool. All that follows from them is said of these then,
            and not of the parameters, where most of the conflict may remain.
    """

    names: tuple[str, ...]
    steps: Tensor
    gramians: Tensor
    weights: Tensor
    rates: Tensor
    layers: dict[str, Tensor]
    present: Tensor
    step_slopes: Tensor
    step_cosines: Tensor
    step_limits: Tensor
    rules: tuple[str, ...]
    at_features: Tensor

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.steps)

    def __repr__(self) -> str:
        """Say what is in it: its numbers would fill pages."""
        parts = [f"names={self.names}", f"steps={len(self)}"]
        if self.layers:
            parts.append(f"layers={list(self.layers)}")
        return f"Recording({', '.join(parts)})"

    def _repr_html_(self) -> str:
        """Show a notebook how often the pairs most in conflict are in it."""
        shares = self.conflict_shares
        worst = sorted(shares, key=lambda pair: -shares[pair])[:_MOST_ROWS]
        rows = "".join(
            f"<tr><td>{escape(self.names[i])}</td><td>{escape(self.names[j])}</td>"
            f"<td>{shares[i, j]:.0%}</td></tr>"
            for i, j in worst
        )
        head = "<tr><th>task</th><th>task</th><th>steps in conflict</th></tr>"
        table = f"<table>{head}{rows}</table>" if rows else ""
        return f"<p>{len(self)} steps of {len(self.names)} tasks</p>{table}"

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The pairs of tasks, by number."""
        return list(combinations(range(len(self.names)), 2))

    @property
    def norms(self) -> Tensor:
        """Norms of the task gradients, ``[n, K]``."""
        return self.gramians.diagonal(dim1=1, dim2=2).sqrt()

    @property
    def cosines(self) -> Tensor:
        """Cosines between the task gradients, ``[n, K, K]``; 0 with a zero one."""
        return cosines(self.gramians)

    @property
    def conflicts(self) -> Tensor:
        """Whether two task gradients form an obtuse angle, ``[n, K, K]``, bool."""
        return self.gramians < 0

    @property
    def slopes(self) -> Tensor:
        """Inner products of the update and the task gradients, ``[n, K]``: G tau."""
        return self._times(self.weights)

    @property
    def plain_slopes(self) -> Tensor:
        """The same for the plain sum of the gradients in place of the update."""
        return self._times(torch.ones_like(self.weights))

    @property
    def sgd_effects(self) -> Tensor:
        """First-order effect of a step of plain SGD on each loss, ``[n, K]``: -lr G tau.

        Other base optimizers scale the update by parameter, and have momentum: what their
        steps did is in ``step_slopes``. With losses scaled by s it is s^2 times as large.
        NaN where ``at_features``: those products do not tell.
        """
        effects = -self.rates[:, None] * self.slopes
        return effects.masked_fill(self.at_features[:, None], math.nan)

    @property
    def step_opposed(self) -> Tensor:
        """Whether the step taken raised a loss, to first order, ``[n, K]``, bool.

        Counted is what the rounding of the parameters to their dtype cannot have done.
        """
        return self.step_cosines > self.step_limits

    @property
    def has_steps(self) -> Tensor:
        """Whether the step taken was recorded, ``[n]``, bool."""
        return ~self.step_cosines.isnan().all(1)

    @property
    def finite(self) -> Tensor:
        """Whether all inner products of a step are finite, ``[n]``, bool."""
        both = self.present[:, :, None] & self.present[:, None, :]
        return (self.gramians.isfinite() | ~both).flatten(1).all(1)

    @property
    def conflict_shares(self) -> dict[tuple[int, int], float]:
        """Share of the steps with both tasks in which a pair is in conflict."""
        return {
            (i, j): _share_below_zero(self.gramians[:, i, j]) for i, j in self.pairs
        }

    @property
    def layer_shares(self) -> dict[str, float]:
        """Share of the steps with a layer in which it has a pair in conflict, by name.

        Without layers that at most one task ever reaches, as its own head.
        """
        shares = {}
        for name, products in self.layers.items():
            reached = products.diagonal(dim1=1, dim2=2).nan_to_num(0) > 0
            if reached.any(0).sum() < 2:
                continue
            values = products.flatten(1)
            known = ~values.isnan().all(1)
            shares[name] = _share_below_zero(values[known].nan_to_num(0).amin(1))
        return shares

    def opposed(self, weights: Tensor) -> Tensor:
        """Say which tasks a weighted sum works against, ``[n, K]``, bool.

        Exact weights leave a slope of zero at times, of which rounding may be below it: a
        cosine below -1e-6 counts.
        """
        return self.update_cosines(weights) < -1e-6

    def where(self, chosen: Tensor) -> "Recording":
        """Take some of the steps: those of a mask, ``[n]``, bool."""
        return replace(
            self,
            steps=self.steps[chosen],
            gramians=self.gramians[chosen],
            weights=self.weights[chosen],
            rates=self.rates[chosen],
            layers={name: found[chosen] for name, found in self.layers.items()},
            present=self.present[chosen],
            step_slopes=self.step_slopes[chosen],
            step_cosines=self.step_cosines[chosen],
            step_limits=self.step_limits[chosen],
            rules=tuple(compress(self.rules, chosen.tolist())),
            at_features=self.at_features[chosen],
        )

    def update_cosines(self, weights: Tensor) -> Tensor:
        """Take the cosines of a weighted sum and the task gradients, ``[n, K]``.

        Args:
            weights: ``[n, K]``, those of the update or any others.

        Returns:
            NaN for a task without part in a step, 0 where a gradient or the sum is zero.
        """
        count, tasks = weights.shape
        slopes = self._times(weights)
        extended = slopes.new_zeros(count, tasks + 1, tasks + 1)
        extended[:, :tasks, :tasks] = self.gramians
        extended[:, tasks, :tasks] = extended[:, :tasks, tasks] = slopes
        # Its square, which rounding may leave below zero.
        squares = (slopes * weights).masked_fill(~self.present, 0).sum(1).clamp(min=0)
        extended[:, tasks, tasks] = squares
        found = cosines(extended)[:, tasks, :tasks]
        return found.masked_fill(~self.present, math.nan)

    def rows(self) -> Iterator[dict[str, float]]:
        """Give each step as flat numbers, from ``norm/a`` to ``layer/0/cosine/a|b``."""
        names, pairs = [name.replace("|", r"\|") for name in self.names], self.pairs
        columns = {"step": self.steps.double(), "lr": self.rates}
        for name, values in self._by_task().items():
            columns |= {f"{name}/{task}": values[:, k] for k, task in enumerate(names)}
        angles = {"": self.cosines}
        angles |= {f"layer/{name}/": cosines(g) for name, g in self.layers.items()}
        for i, j in pairs:
            pair = f"{names[i]}|{names[j]}"
            columns[f"product/{pair}"] = self.gramians[:, i, j]
            columns[f"conflict/{pair}"] = self.conflicts[:, i, j].double()
            for prefix, values in angles.items():
                columns[f"{prefix}cosine/{pair}"] = values[:, i, j]
        lists = [column.tolist() for column in columns.values()]
        for row in zip(*lists, strict=True):
            yield dict(zip(columns, row, strict=True))

    def log(self, logger: Logger) -> None:
        """Give each step to a logger, by ``logger.log(row)``."""
        for row in self.rows():
            logger.log(row)

    def to_tensorboard(self, writer: ScalarWriter, prefix: str = "ghopt/") -> None:
        """Write each number of each step by ``writer.add_scalar``."""
        for row in self.rows():
            step = int(row.pop("step"))
            for name, value in row.items():
                writer.add_scalar(prefix + name, value, step)

    def to_csv(self, path: str | Path) -> None:
        """Write the rows as a table, in place of what is in the file."""
        rows = list(self.rows())
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0] if rows else ())
            writer.writeheader()
            writer.writerows(rows)

    def to_jsonl(self, path: str | Path) -> None:
        """Append a line per step to a file: all that is recorded, to the last digit.

        So ``flush`` may be called as often as one likes, and a training that is resumed
        with its recorder goes on in the same file. Another training is for another file.
        What is not finite is written as null, and comes back as NaN.
        """
        append_lines(self._as_steps(), Path(path))

    @classmethod
    def from_jsonl(cls, path: str | Path) -> "Recording":
        """Read what :meth:`to_jsonl` wrote, in any number of parts.

        Where the numbers of the steps go back, as after a checkpoint that is older than
        what was written, the later lines replace the earlier ones. A last line without an
        end is left out: whoever wrote it was killed.

        Raises:
            ValueError: if a line is not one of a recording.
        """
        return assemble(read_steps(Path(path)))

    def _by_task(self) -> dict[str, Tensor]:
        found = {
            "norm": self.norms,
            "weight": self.weights,
            "slope": self.slopes,
            "sgd_effect": self.sgd_effects,
        }
        if self.has_steps.any():
            found |= {"step_slope": self.step_slopes, "step_cosine": self.step_cosines}
        return found

    def _as_steps(self) -> Iterator[Step]:
        """Take the steps apart again, each with the tasks that it had."""
        change = torch.stack([self.step_slopes, self.step_cosines, self.step_limits])
        for row, present in enumerate(self.present):
            over = {
                name: products[row][present][:, present]
                for name, products in self.layers.items()
            }
            yield Step(
                int(self.steps[row]),
                tuple(compress(self.names, present.tolist())),
                self.gramians[row][present][:, present],
                self.weights[row][present],
                self.rates[row],
                {
                    name: found
                    for name, found in over.items()
                    if not found.isnan().all()
                },
                change[:, row][:, present] if self.has_steps[row] else None,
                self.rules[row],
                bool(self.at_features[row]),
            )

    def _times(self, weights: Tensor) -> Tensor:
        """Multiply the Gramians by ``[n, K]``; a task without part adds nothing."""
        terms = self.gramians * weights[:, None, :]
        totals = terms.masked_fill(~self.present[:, None, :], 0).sum(2)
        return totals.masked_fill(~self.present, math.nan)


def _share_below_zero(products: Tensor) -> float:
    known = products[~products.isnan()]
    return float((known < 0).double().mean()) if len(known) else 0.0


def assemble(steps: Sequence[Step]) -> Recording:
    """Make one recording of steps that may have had other tasks and layers."""

    def kind(step: Step) -> object:
        return step.names, step.layers.keys(), step.change is None

    parts = [_stack(list(group)) for _, group in groupby(steps, kind)] or [_stack([])]
    names = tuple(dict.fromkeys(name for part in parts for name in part.names))
    layers = dict.fromkeys(name for part in parts for name in part.layers)
    return Recording(
        names=names,
        steps=torch.cat([part.steps for part in parts]),
        gramians=torch.cat(
            [_spread(part.gramians, part.names, names) for part in parts]
        ),
        weights=torch.cat([_spread(part.weights, part.names, names) for part in parts]),
        rates=torch.cat([part.rates for part in parts]),
        layers={
            layer: torch.cat(
                [
                    _spread(part.layers[layer], part.names, names)
                    if layer in part.layers
                    else _spread(part.gramians[:, :0, :0], (), names)
                    for part in parts
                ]
            )
            for layer in layers
        },
        present=torch.cat(
            [
                ~_spread(part.present.double(), part.names, names).isnan()
                for part in parts
            ]
        ),
        step_slopes=torch.cat(
            [_spread(part.step_slopes, part.names, names) for part in parts]
        ),
        step_cosines=torch.cat(
            [_spread(part.step_cosines, part.names, names) for part in parts]
        ),
        step_limits=torch.cat(
            [_spread(part.step_limits, part.names, names) for part in parts]
        ),
        rules=tuple(step.rule for step in steps),
        at_features=torch.cat([part.at_features for part in parts]),
    )


def _stack(steps: list[Step]) -> Recording:
    """Make a recording of steps with the same tasks and layers."""

    def stacked(tensors: Iterable[Tensor], *shape: int) -> Tensor:
        found = [*tensors]
        if not found:
            return torch.zeros(0, *shape, dtype=torch.float64, device="cpu")
        # Stacked where they are: one transfer and one wait, not one per step.
        return torch.stack(found).cpu().double()

    names, layers = (steps[0].names, steps[0].layers) if steps else ((), {})
    unknown = torch.full((3, len(names)), math.nan, dtype=torch.float64, device="cpu")
    changes = stacked(
        (unknown if step.change is None else step.change for step in steps), 3, 0
    )
    return Recording(
        names=names,
        steps=torch.tensor(
            [step.number for step in steps], dtype=torch.int64, device="cpu"
        ),
        gramians=stacked((step.gramian for step in steps), 0, 0),
        weights=stacked((step.weights for step in steps), 0),
        rates=stacked(
            step.rate.detach().reshape(())
            if isinstance(step.rate, Tensor)
            else torch.tensor(step.rate, dtype=torch.float64, device="cpu")
            for step in steps
        ),
        layers={name: stacked(step.layers[name] for step in steps) for name in layers},
        present=torch.ones(len(steps), len(names), dtype=torch.bool, device="cpu"),
        step_slopes=changes[:, 0],
        step_cosines=changes[:, 1],
        step_limits=changes[:, 2],
        rules=tuple(step.rule for step in steps),
        at_features=torch.tensor(
            [step.at_features for step in steps], dtype=torch.bool, device="cpu"
        ),
    )


def _spread(values: Tensor, names: tuple[str, ...], among: tuple[str, ...]) -> Tensor:
    """Bring values by task, ``[n, k]`` or ``[n, k, k]``, to the places of more tasks."""
    indices = [among.index(name) for name in names]
    places = torch.tensor(indices, dtype=torch.int64, device="cpu")
    shape = [len(values)] + [len(among)] * (values.dim() - 1)
    spread = values.new_full(shape, math.nan)
    if values.dim() == 2:
        spread[:, places] = values
    else:
        spread[:, places[:, None], places] = values
    return spread
