"""The store: what is appended comes back by its key, what is broken is named."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.common.store import append_run, hash_of, read_runs


@dataclass(frozen=True)
class Kept:
    """A run of which nothing matters."""

    key: str
    numbers: list[float]


ONE, OTHER = Kept("a", [0.1, 1e-17]), Kept("b", [2.0])


def test_finished_runs_come_back_and_an_unfinished_line_is_begun_anew(
    tmp_path: Path,
) -> None:
    store = tmp_path / "runs.jsonl"
    assert read_runs(store, Kept) == {}
    append_run(store, ONE)
    append_run(store, OTHER)
    assert read_runs(store, Kept) == {"a": ONE, "b": OTHER}
    whole = store.read_text(encoding="utf-8")
    store.write_text(whole[:-9], encoding="utf-8")  # killed while it wrote
    assert read_runs(store, Kept) == {"a": ONE}
    append_run(store, OTHER)
    assert store.read_text(encoding="utf-8") == whole


def test_a_first_line_that_is_unfinished_is_begun_anew(tmp_path: Path) -> None:
    store = tmp_path / "runs.jsonl"
    store.write_text('{"key":', encoding="utf-8")
    assert read_runs(store, Kept) == {}
    append_run(store, ONE)
    assert read_runs(store, Kept) == {"a": ONE}


@pytest.mark.parametrize("line", ['{"a": 1}', '{"key": "c"', "", "[]"])
def test_a_store_of_something_else_is_refused(tmp_path: Path, line: str) -> None:
    store = tmp_path / "runs.jsonl"
    append_run(store, ONE)
    store.write_text(f"{store.read_text(encoding='utf-8')}{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"got .*runs\.jsonl with .* in its line 2"):
        read_runs(store, Kept)


def test_a_key_depends_on_every_part_and_not_on_the_order_of_names() -> None:
    assert hash_of({"a": 1, "b": 2}, "x") == hash_of({"b": 2, "a": 1}, "x")
    keys = {hash_of({"a": 1}), hash_of({"a": 2}), hash_of({"a": 1}, "x"), hash_of("x")}
    assert len(keys) == 4
