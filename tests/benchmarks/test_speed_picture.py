"""The picture of the speed table: its bars are what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.patches import Rectangle

from benchmarks.speed import picture
from benchmarks.speed.methods import METHODS
from benchmarks.speed.problems import NETWORKS as ALL


def figure(
    row: str, column: str, value: float | None, tasks: int = 2
) -> dict[str, Any]:
    return {
        "table": "time",
        "tasks": tasks,
        "row": row,
        "column": column,
        "value": value,
    }


FIGURES = [
    figure("plain", "tiny", 0.5),
    figure("ghopt gh", "tiny", 1.5),
    figure("conflictfree PCGrad", "tiny", 10.0),
    figure("pytorch_optimizer", "tiny", None),
    figure("plain", "mlp32", 0.8, tasks=4),
    figure("ghopt gh", "tiny", 9.0, tasks=4),
    {**figure("ghopt gh", "tiny", 7.0), "table": "memory"},
]


def test_a_bar_is_the_time_over_that_of_the_plain_step() -> None:
    (panel,) = picture.draw(FIGURES, 2).axes
    assert panel.get_title() == "50K parameters"
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert names == ["plain sum, one pass", "ghopt", "conflictfree PCGrad"]
    bars = [bar for bar in panel.patches if isinstance(bar, Rectangle)]
    assert [bar.get_width() for bar in bars] == [1, 3, 6]  # the last is cut
    assert [text.get_text() for text in panel.texts] == [" 1.00", " 3.00", " 20.00"]


def test_a_number_of_tasks_that_was_not_timed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tasks must be .* got 8"):
        picture.draw(FIGURES, 8)


def test_all_rows_and_networks_that_are_drawn_exist() -> None:
    assert {*picture.ROWS} <= {method.name for method in METHODS}
    assert {*picture.NETWORKS} <= {*ALL}


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_command_writes_the_same_picture_each_time(
    tmp_path: Path, kind: str
) -> None:
    figures = tmp_path / "figures.json"
    figures.write_text(json.dumps({"figures": FIGURES}), encoding="utf-8")
    written = [tmp_path / f"{name}.{kind}" for name in "ab"]
    for path in written:
        picture.main([str(path), str(figures), "--tasks", "2"])
    assert written[0].read_bytes() == written[1].read_bytes()
    assert written[0].stat().st_size > 5000


def test_of_two_files_the_later_counts(tmp_path: Path) -> None:
    later = [figure("ghopt gh", "tiny", 2.0)]
    (panel,) = picture.draw([*FIGURES, *later], 2).axes
    assert panel.texts[1].get_text() == " 4.00"
    for name, figures in {"one": FIGURES, "other": later}.items():
        text = json.dumps({"figures": figures})
        (tmp_path / name).write_text(text, encoding="utf-8")
    drawn = tmp_path / "drawn.svg"
    picture.main([str(drawn), str(tmp_path / "one"), str(tmp_path / "other")])
    assert "> 4.00<" in drawn.read_text(encoding="utf-8")
