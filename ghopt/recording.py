"""See the conflict: what each step found and did, recorded without waiting for it.

A :class:`Recorder` keeps Gramians and weights where they are, on the device, and reads
them on the host in ``flush`` only. All else (norms, cosines, conflicts, effects) follows
from them, in :class:`Recording`.

Gradients are recorded as ``backward`` gets them: under loss scaling, norms, inner products
and what follows from them are those of the scaled losses. Cosines and weights do not depend
on it.
"""

import csv
import json
import math
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghopt.geometry import Weighting, cosines, gh
from ghopt.harmonize import GramianOf, Harmonization, measured
from ghopt.losses import Losses, named_losses, warn_of_many
from ghopt.optimizer import HarmonizedOptimizer
from ghopt.passes import taken

Layers: TypeAlias = nn.Module | Mapping[str, Iterable[Tensor]]
"""Groups of parameters by name; of a module, each of its modules with its own ones."""


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
    """

    names: tuple[str, ...]
    steps: Tensor
    gramians: Tensor
    weights: Tensor
    rates: Tensor
    layers: dict[str, Tensor]
    present: Tensor

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.steps)

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
    def effects(self) -> Tensor:
        """First-order effect of the update on each loss, ``[n, K]``: -lr G tau.

        What a step of plain SGD would change in the losses. Other base optimizers scale
        the update by parameter; then the sign is a hint, and the size means little. With
        losses scaled by s it is s^2 times as large.
        """
        return -self.rates[:, None] * self.slopes

    @property
    def finite(self) -> Tensor:
        """Whether all inner products of a step are finite, ``[n]``, bool."""
        both = self.present[:, :, None] & self.present[:, None, :]
        return (self.gramians.isfinite() | ~both).flatten(1).all(1)

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
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0] if rows else ())
            writer.writeheader()
            writer.writerows(rows)

    def to_jsonl(self, path: str | Path) -> None:
        """Append a line per step to a file: all that is recorded, to the last digit.

        So ``flush`` may be called as often as one likes, and a training that is resumed
        with its recorder goes on in the same file. Another training is for another file.
        What is not finite is written as null, and comes back as NaN.
        """
        _drop_unfinished(Path(path))
        with Path(path).open("a") as file:
            file.writelines(
                f"{json.dumps(line, allow_nan=False)}\n" for line in self._lines()
            )

    @classmethod
    def from_jsonl(cls, path: str | Path) -> "Recording":
        """Read what :meth:`to_jsonl` wrote, in any number of parts.

        Where the numbers of the steps go back, as after a checkpoint that is older than
        what was written, the later lines replace the earlier ones. A last line without an
        end is left out: whoever wrote it was killed.

        Raises:
            ValueError: if a line is not one of a recording.
        """
        steps: list[_Step] = []
        for number, line in enumerate(Path(path).read_text().split("\n")[:-1], 1):
            try:
                step = _read(json.loads(line))
                while steps and steps[-1].number >= step.number:
                    steps.pop()
                steps.append(step)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"path must be of a recording, got {path} with {error!r} in its line "
                    f"{number}"
                ) from error
        return _assemble(steps)

    def _by_task(self) -> dict[str, Tensor]:
        return {
            "norm": self.norms,
            "weight": self.weights,
            "slope": self.slopes,
            "effect": self.effects,
        }

    def _lines(self) -> Iterator[dict[str, Any]]:
        for row, present in enumerate(self.present):
            layers = {
                name: products[row][present][:, present]
                for name, products in self.layers.items()
            }
            yield {
                "step": int(self.steps[row]),
                "names": [self.names[k] for k in present.nonzero().flatten().tolist()],
                "gramian": _finite(self.gramians[row][present][:, present].tolist()),
                "weights": _finite(self.weights[row][present].tolist()),
                "lr": _finite(self.rates[row].item()),
                "layers": {
                    name: _finite(products.tolist())
                    for name, products in layers.items()
                    if not products.isnan().all()
                },
            }

    def _times(self, weights: Tensor) -> Tensor:
        """Multiply the Gramians by ``[n, K]``; a task without part adds nothing."""
        terms = self.gramians * weights[:, None, :]
        totals = terms.masked_fill(~self.present[:, None, :], 0).sum(2)
        return totals.masked_fill(~self.present, math.nan)


class _Step(NamedTuple):
    """What is kept of one step, the tensors where they are."""

    number: int
    names: tuple[str, ...]
    gramian: Tensor
    weights: Tensor
    rate: Tensor | float
    layers: dict[str, Tensor]


class Recorder:
    """Keeps what the last steps found and did, until it is flushed.

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = HarmonizedOptimizer(torch.optim.SGD(model.parameters()))
    >>> recorder = Recorder()
    >>> handle = recorder.attach(optimizer, layers=model)
    >>> out = model(torch.ones(4, 2))
    >>> optimizer.step(losses={"up": out.mean(), "down": -2 * out.mean()})
    >>> recording = recorder.flush()
    >>> recording.names, recording.conflicts[0, 0, 1].item()
    (('up', 'down'), True)

    On the step path nothing is computed or read: small tensors that are there anyway are
    kept, two a step, and one more for each layer: 8 K^2 bytes each. Steps between the
    measurements of ``measure_every``, and calls with ``accumulate_only``, find nothing
    and are not recorded. Not for captured CUDA graphs, which would write all their
    steps to the same two tensors.

    A recorder can be pickled with what it holds; attach it again after loading. A weighting
    must not write to its argument, which is kept.

    Args:
        size: number of steps that it holds at most; with more, the oldest are lost.

    Attributes:
        count: number of steps recorded ever.
        lost: how many of them were overwritten before a flush.

    Raises:
        TypeError: if ``size`` is no whole number.
        ValueError: if ``size`` is less than 1.
    """

    def __init__(self, size: int = 4096) -> None:
        if isinstance(size, torch.optim.Optimizer):
            raise TypeError(
                "size must be an int, got an optimizer: make a Recorder(), then "
                "recorder.attach(optimizer)"
            )
        if not isinstance(size, int):
            raise TypeError(f"size must be an int, got {size!r}")
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.count = 0
        self.lost = 0
        self._steps: deque[_Step] = deque(maxlen=size)
        self._handles: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        """Give what a copy needs: it is attached to nothing."""
        return {**self.__dict__, "_handles": []}

    def attach(
        self, optimizer: HarmonizedOptimizer, *, layers: Layers | None = None
    ) -> RemovableHandle:
        """Record every step of an optimizer that measures.

        Args:
            optimizer: its first group's ``lr`` is recorded, too. Of Accelerate's, give
                ``.optimizer``.
            layers: parameters of which to take the inner products by themselves, by a
                name; or a module, for each module in it that has parameters of its own.
                Costs as much again as the Gramian itself. What is shared by two layers
                counts in both; DTensors in them on all ranks alike.

        Returns:
            A handle whose ``remove()`` ends the recording.

        Raises:
            TypeError: if ``optimizer`` is no harmonized one, or a layer is a tensor, not
                some tensors.
            ValueError: if the recorder is attached to this optimizer already: each step
                would be recorded twice.
        """
        if not isinstance(optimizer, HarmonizedOptimizer):
            raise TypeError(
                f"optimizer must be a HarmonizedOptimizer, got {type(optimizer)}; a model "
                "goes into layers=, a plain loop uses measure(..., recorder=recorder)"
            )
        groups = _listed(layers)
        hooks = optimizer._harmonize_hooks
        if any(
            handle.hooks_dict_ref() is hooks and handle.id in hooks
            for handle in self._handles
        ):
            raise ValueError(
                "optimizer must not be attached twice, got one that this recorder records "
                "already: call remove() on the handle of the first attach(), or make a "
                "new optimizer and Recorder"
            )
        # Not the optimizer itself, which holds this hook: both would outlive their use.
        owner = weakref.ref(optimizer)

        def hook(found: Harmonization, gramian_of: GramianOf) -> None:
            wrapper = owner()
            rate = wrapper.param_groups[0].get("lr", math.nan) if wrapper else math.nan
            # A scheduler may change a tensor in place.
            rate = rate.detach().clone() if isinstance(rate, Tensor) else rate
            self.record(found, rate=rate, layers=_over(groups, gramian_of))

        handle = optimizer.register_harmonize_hook(hook)
        self._handles.append(handle)
        return handle

    def record(
        self,
        found: Harmonization,
        *,
        rate: Tensor | float = math.nan,
        layers: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Record a step by hand, as what :func:`measure` returns.

        Args:
            found: its tensors are kept, not copied.
            rate: learning rate.
            layers: inner products over each layer, ``[K, K]``.
        """
        self.lost += len(self._steps) == self._steps.maxlen
        self._steps.append(
            _Step(
                self.count,
                found.names,
                found.gramian,
                found.weights,
                rate,
                dict(layers or {}),
            )
        )
        self.count += 1

    def flush(self) -> Recording:
        """Hand over all that is held, and hold nothing: waits for the device."""
        recording = _assemble(list(self._steps))
        self._steps.clear()
        return recording


def measure(
    losses: Losses,
    params: Iterable[Tensor],
    weighting: Weighting = gh,
    *,
    recorder: Recorder | None = None,
    layers: Layers | None = None,
) -> Harmonization:
    """Measure the conflict of some losses, and do nothing about it.

    For a loop that stays as it is: ``.grad`` is left alone, and so is the graph, for the
    backward pass to come. Costs a backward pass per task. Gradients are taken with
    :func:`torch.autograd.grad`: reentrant checkpointing and FSDP2 do not work.

    Args:
        losses: one scalar per task, as for ``HarmonizedOptimizer.backward``.
        params: parameters over which the Gramian is taken.
        weighting: from a Gramian, shape ``[K, K]``, to weights, shape ``[K]``.
        recorder: records what is found.
        layers: as for :meth:`Recorder.attach`; for the recorder.

    Returns:
        What ``backward`` of an optimizer with these parameters would find and do.

    Raises:
        TypeError: if ``losses`` is not iterable, a loss is no tensor, ``params`` are no
            parameters, or the weighting returns no tensor.
        ValueError: if ``losses`` or what the weighting returns is not as described, or
            no loss reaches any of ``params``.
    """
    named = named_losses(losses)
    warn_of_many(named)
    gradients = taken(named, params)
    found = measured(gradients, named, weighting)
    if recorder is not None:
        layers_of = _listed(layers)
        recorder.record(found, layers=_over(layers_of, gradients.gramian))
    return found


def by_layer(model: nn.Module) -> dict[str, list[Tensor]]:
    """List the parameters of each module that has some of its own, by its name.

    The model itself, if it has some, has the name "".
    """
    own = {
        name: list(module.parameters(recurse=False))
        for name, module in model.named_modules()
    }
    return {name: parameters for name, parameters in own.items() if parameters}


def _listed(layers: Layers | None) -> Layers:
    """Take the parameters out of iterators, which serve once only.

    Raises:
        TypeError: if a layer is a tensor.
    """
    if isinstance(layers, nn.Module):
        return layers
    for name, parameters in (layers or {}).items():
        if isinstance(parameters, Tensor):
            raise TypeError(f"layers[{name!r}] must be an iterable of tensors, got one")
    return {name: list(parameters) for name, parameters in (layers or {}).items()}


def _over(layers: Layers, gramian_of: GramianOf) -> dict[str, Tensor]:
    """Take the inner products over each layer."""
    # Of a module anew at each step: Accelerate and FSDP swap parameters.
    named = by_layer(layers) if isinstance(layers, nn.Module) else layers
    return {name: gramian_of(parameters) for name, parameters in named.items()}


def _assemble(steps: Sequence[_Step]) -> Recording:
    """Make one recording of steps that may have had other tasks and layers."""
    parts = [
        _stack(list(group))
        for _, group in groupby(steps, lambda step: (step.names, step.layers.keys()))
    ] or [_stack([])]
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
    )


def _stack(steps: list[_Step]) -> Recording:
    """Make a recording of steps with the same tasks and layers."""

    def stacked(tensors: Iterable[Tensor], *shape: int) -> Tensor:
        found = [*tensors]
        if not found:
            return torch.zeros(0, *shape, dtype=torch.float64, device="cpu")
        # Stacked where they are: one transfer and one wait, not one per step.
        return torch.stack(found).to("cpu", torch.float64)

    names, layers = (steps[0].names, steps[0].layers) if steps else ((), {})
    return Recording(
        names=names,
        steps=torch.tensor(
            [step.number for step in steps], dtype=torch.int64, device="cpu"
        ),
        gramians=stacked((step.gramian for step in steps), 0, 0),
        weights=stacked((step.weights for step in steps), 0),
        rates=stacked(
            step.rate.double().reshape(())
            if isinstance(step.rate, Tensor)
            else torch.tensor(step.rate, dtype=torch.float64, device="cpu")
            for step in steps
        ),
        layers={name: stacked(step.layers[name] for step in steps) for name in layers},
        present=torch.ones(len(steps), len(names), dtype=torch.bool, device="cpu"),
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


def _read(line: dict[str, Any]) -> _Step:
    """Make a step of a line of a file.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: if it is none.
    """
    tasks = len(line["names"])
    return _Step(
        int(line["step"]),
        tuple(map(str, line["names"])),
        _tensor(line["gramian"], tasks, tasks),
        _tensor(line["weights"], tasks),
        _tensor(line["lr"]),
        {name: _tensor(rows, tasks, tasks) for name, rows in line["layers"].items()},
    )


def _tensor(values: Any, *shape: int) -> Tensor:
    """Make a tensor of nested lists, null becoming NaN."""
    tensor = torch.tensor(_with_nan(values), dtype=torch.float64, device="cpu")
    if tensor.shape != shape:
        raise ValueError(f"expected shape {list(shape)}, got {list(tensor.shape)}")
    return tensor


def _with_nan(values: Any) -> Any:
    if isinstance(values, list):
        return [_with_nan(value) for value in values]
    return math.nan if values is None else values


def _finite(values: Any) -> Any:
    """Replace what JSON does not know by None, in nested lists."""
    if isinstance(values, list):
        return [_finite(value) for value in values]
    return values if math.isfinite(values) else None


def _drop_unfinished(path: Path) -> None:
    """Take away a last line without an end, which a killed process left."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        file.seek(-1, 2)
        if file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
