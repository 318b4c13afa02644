"""How pictures are written."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from benchmarks.common.picture import save


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_same_figure_gives_the_same_bytes(tmp_path: Path, kind: str) -> None:
    for name in "ab":
        figure = Figure()
        figure.subplots().set_title("one & only")
        save(figure, tmp_path / f"{name}.{kind}")
    one, other = (tmp_path / f"{name}.{kind}" for name in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_text_is_text_and_the_page_below_does_not_show(tmp_path: Path) -> None:
    figure = Figure(facecolor="none")
    figure.subplots().set_title("words")
    save(figure, tmp_path / "one.svg")
    save(figure, tmp_path / "one.png")
    assert ">words</text>" in (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert imread(tmp_path / "one.png")[0, 0].tolist() == [1, 1, 1, 1]
