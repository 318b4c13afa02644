"""A recording as lines of JSON: what is written of each step, and read again."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """What is kept of one step, the tensors where they are.

    Attributes:
        number: of the step.
        names: of the tasks.
        gramian: of their gradients, ``[K, K]``.
        weights: ``[K]``.
        rate: learning rate.
        layers: the Gramian over each layer.
        change: slopes, cosines and limits of the step taken, ``[3, K]``, if recorded.
        rule: name of the weighting.
        at_features: whether the Gramian is that of the gradients at features.
    """

    number: int
    names: tuple[str, ...]
    gramian: Tensor
    weights: Tensor
    rate: Tensor | float
    layers: dict[str, Tensor]
    change: Tensor | None = None
    rule: str = ""
    at_features: bool = False


def append_lines(steps: Iterable[Step], path: Path) -> None:
    """Write a line per step, after what a killed process left of one."""
    _drop_unfinished(path)
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.writelines(
            f"{json.dumps(_line(step), allow_nan=False)}\n" for step in steps
        )


def read_steps(path: Path) -> list[Step]:
    """Read what :func:`append_lines` wrote; later lines replace those of the same steps.

    Raises:
        ValueError: if a line is not one of a recording.
    """
    steps: list[Step] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
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
    return steps


def _line(step: Step) -> dict[str, Any]:
    """Give what a file keeps of a step, whose tensors are on the CPU."""
    change = {} if step.change is None else {"change": _numbers(step.change)}
    return {
        "step": step.number,
        "names": list(step.names),
        "gramian": _numbers(step.gramian),
        "weights": _numbers(step.weights),
        "lr": _finite(float(step.rate)),
        "rule": step.rule,
        **({"at_features": True} if step.at_features else {}),
        **change,
        "layers": {name: _numbers(products) for name, products in step.layers.items()},
    }


def _numbers(tensor: Tensor) -> Any:
    """List the numbers of a tensor, None for what is not finite."""
    return _finite(tensor.tolist())


def _read(line: dict[str, Any]) -> Step:
    """Make a step of a line of a file.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: if it is none.
    """
    tasks = len(line["names"])
    return Step(
        int(line["step"]),
        tuple(map(str, line["names"])),
        _tensor(line["gramian"], tasks, tasks),
        _tensor(line["weights"], tasks),
        _tensor(line["lr"]),
        {name: _tensor(rows, tasks, tasks) for name, rows in line["layers"].items()},
        _tensor(line["change"], 3, tasks) if "change" in line else None,
        str(line.get("rule", "")),
        bool(line.get("at_features", False)),
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
