"""The store of runs: a file with one JSON object per line and run, told apart by keys."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Keyed(Protocol):
    """Something with a key."""

    @property
    def key(self) -> str:
        """Tell it from others."""
        ...


KeyedT = TypeVar("KeyedT", bound=Keyed)


def append_run(store: Path, run: "DataclassInstance") -> None:
    """Write one more line, after what is left of one that was not finished."""
    with store.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(f"{json.dumps(asdict(run))}\n".encode())


def read_runs(store: Path, make: Callable[..., KeyedT]) -> dict[str, KeyedT]:
    """Read what :func:`append_run` wrote, by key, with lists in place of tuples.

    An unfinished last line is none, and a file that is not there has none.

    Raises:
        ValueError: if another line is not one of a run.
    """
    if not store.exists():
        return {}
    runs = {}
    lines = store.read_text(encoding="utf-8").split("\n")
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
