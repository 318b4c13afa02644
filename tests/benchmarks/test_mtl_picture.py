"""The picture of the rules at their best: what is drawn is what the runs have."""

import re
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from benchmarks.common.statistics import paired_difference
from benchmarks.common.store import append_run
from benchmarks.mtl import picture
from benchmarks.mtl.tuning import (
    CHOOSING,
    COMPARING,
    CONTENDERS,
    Cell,
    Order,
    Run,
    at_best,
    whole_cells,
)

DRAWN = Path(__file__).parents[2] / "docs" / "pictures" / "mtl-tuned.svg"
CELL = Cell(1, 10)


def a_run(name: str, cell: Cell, seed: int, error: float, problem: str = "heat") -> Run:
    order = Order(problem, name, cell, seed)
    metrics = {"rel. L2 error %": error}
    return Run(order.key, problem, name, *cell, seed, order.steps, metrics, "2.13.0")


def runs_of() -> dict[str, Run]:
    """Make all runs of one cell, with errors that grow by seed and by contender."""
    runs = [
        a_run(name, CELL, seed, (place + 1) * (1 + number / 10))
        for place, name in enumerate(CONTENDERS)
        for number, seed in enumerate([*CHOOSING, *COMPARING])
    ]
    return {run.key: run for run in runs}


def test_a_cell_is_whole_where_every_contender_has_all_runs_that_choose() -> None:
    runs = runs_of()
    more = [a_run("gh", Cell(4, 1), seed, 1.0) for seed in CHOOSING]
    known = {**runs, **{run.key: run for run in more}}
    assert whole_cells(known, "heat") == [CELL]
    assert whole_cells(known, "poisson") == []
    del known[a_run("sum", CELL, CHOOSING[0], 0).key]
    assert whole_cells(known, "heat") == []


def test_a_contender_without_all_its_runs_is_left_out() -> None:
    runs = runs_of()
    del runs[a_run("gh", CELL, COMPARING[3], 0).key]
    assert [*CONTENDERS] == [*at_best(runs_of(), "heat", [CELL])]
    assert {*CONTENDERS} - {*at_best(runs, "heat", [CELL])} == {"gh"}


def test_dots_are_trainings_lines_their_means_and_figures_the_paired_differences() -> (
    None
):
    runs = runs_of()
    (panel,) = picture.draw(runs).axes
    assert panel.get_title(loc="left") == "heat"
    assert "less is better" in panel.get_xlabel()
    assert panel.get_xscale() == "log"
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert names == [*CONTENDERS]
    best = at_best(runs, "heat", [CELL])
    for place, name in enumerate(CONTENDERS):
        dots, line = panel.lines[2 * place : 2 * place + 2]
        errors = best[name][1]
        assert np.allclose(np.asarray(dots.get_xdata()), errors)
        assert np.allclose(np.asarray(line.get_xdata()), mean(errors))
        assert {*np.asarray(dots.get_ydata()).tolist()} == {place}
    plain = best["sum"][1]
    for text, name in zip(panel.texts, [*CONTENDERS][1:], strict=True):
        more = paired_difference(best[name][1], plain)
        assert text.get_text() == f"{more.mean:+.2f} \u00b1 {more.margin:.2f}"
        assert text.get_fontweight() == ("normal" if more.is_noise else "bold")


def test_what_is_noise_is_not_bold() -> None:
    runs = runs_of()
    for seed in COMPARING:  # as good as the sum, by turns a little better and worse
        plain = runs[a_run("sum", CELL, seed, 0).key].metrics["rel. L2 error %"]
        run = a_run("gh", CELL, seed, plain + (0.1 if seed % 2 else -0.1))
        runs[run.key] = run
    (panel,) = picture.draw(runs).axes
    weights = [text.get_fontweight() for text in panel.texts]
    assert weights.count("normal") == 1
    assert weights[[*CONTENDERS].index("gh") - 1] == "normal"


def test_runs_that_are_whole_for_no_problem_are_refused() -> None:
    with pytest.raises(ValueError, match="runs must be whole"):
        picture.draw({})


def test_the_command_draws_the_picture_of_the_page(tmp_path: Path) -> None:
    path = tmp_path / "new.svg"
    picture.main([str(path)])
    words = [
        re.findall(r"<text [^>]*>([^<]+)</text>", one.read_text(encoding="utf-8"))
        for one in (path, DRAWN)
    ]
    assert words[0] == words[1]
    assert {"heat", "poisson", "helmholtz", "detection-plain"} <= {*words[0]}


def test_another_store_is_read(tmp_path: Path) -> None:
    store, path = tmp_path / "runs.jsonl", tmp_path / "new.png"
    for run in runs_of().values():
        append_run(store, run)
    picture.main([str(path), "--store", str(store)])
    assert path.stat().st_size > 1000
