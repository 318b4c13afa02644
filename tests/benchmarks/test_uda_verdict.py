"""The verdict and its pictures: what is counted and drawn is what the runs have."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D

from benchmarks.common.statistics import STUDENT
from benchmarks.common.store import append_run, read_runs
from benchmarks.uda import verdict
from benchmarks.uda.methods.steps import Config
from benchmarks.uda.runs.records import KEPT, Run, key_of
from benchmarks.uda.verdict import PICTURES, main
from benchmarks.uda.views.beside import (
    PAPER_OBTUSE,
    draw_angles,
    draw_errors,
    draw_table3,
)
from benchmarks.uda.views.compared import tasks_of
from benchmarks.uda.views.forest import RANGE, draw_forest, draw_in_short
from benchmarks.uda.views.paper_table import PAPER
from benchmarks.uda.views.verdict import format_verdict, larger_weights, largest_gain

README = KEPT.with_name("README.md").read_text(encoding="utf-8")
DRAWN = KEPT.parents[2] / "docs" / "pictures"
ROW = re.compile(r"([+-][\d.]+)(?: \((\d+)\))?")


def run_of(rule: str, seed: int, accuracy: float, **other: object) -> Run:
    config = replace(
        Config("usps-mnist", "DWL", rule, seed, steps=7),
        **other,  # type: ignore[arg-type]  # by name
    )
    return Run(
        key=key_of(config),
        config=asdict(config),
        torch="2",
        accuracy=accuracy,
        selected=accuracy - 1,
        errors=json.loads(f"[[0, 90], [7, {100 - accuracy}]]"),
        obtuse=60.0 + seed,
    )


def raw(size: int) -> dict[tuple[str, str, str, float], dict[int, dict[str, float]]]:
    """Read the committed runs by task, method, rule and weight, then seed, by hand."""
    found: dict[tuple[str, str, str, float], dict[int, dict[str, float]]]
    found = defaultdict(dict)
    for line in KEPT.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        one = run["config"]
        if one["size"] == size:
            key = (one["task"], one["method"], one["rule"], one["trade_off"])
            found[key][one["seed"]] = run
    return found


def xs(line: Line2D) -> list[float]:
    return [float(x) for x in np.asarray(line.get_xdata())]


def ys(line: Line2D) -> list[float]:
    return [float(y) for y in np.asarray(line.get_ydata())]


def drawn_rows(
    panel: Axes, first: Axes
) -> Iterator[tuple[str, float, tuple[float, float] | None]]:
    """List what a panel of the forest shows: the rule, the mean, the interval.

    The names are beside the first panel of its row.
    """
    names = [label.get_text() for label in first.get_yticklabels()]
    intervals = {
        segment[0][1]: (segment[0][0], segment[1][0])
        for lines in panel.collections
        if isinstance(lines, LineCollection)
        for segment in lines.get_segments()
    }
    for line in panel.lines:
        if line.get_marker() != "None":
            (value,), (place,) = xs(line), ys(line)
            yield names[int(place)], value, intervals.get(place)


# The forest.


@pytest.mark.parametrize("size", [16, 28])
def test_the_forest_has_every_difference_of_the_committed_runs(size: int) -> None:
    runs = raw(size)
    tasks = tasks_of([*read_runs(KEPT, Run).values()], size)
    wanted = {}
    for (task, method, rule, weight), own in runs.items():
        plain = runs[task, method, "sum", 1.0 if rule == "sum" else weight]
        pairs = [
            own[seed]["accuracy"] - plain[seed]["accuracy"]
            for seed in own
            if seed in plain
        ]
        if (rule, weight) != ("sum", 1) and not rule.startswith("minus") and pairs:
            name = rule if weight == 1 else f"{rule} x {weight:g}"
            wanted[task, method, name] = pairs
    found = {}
    panels = draw_forest(tasks).axes
    for number, panel in enumerate(panels):
        method, task = panel.get_title(loc="left").split(", ")
        first = panels[number - number % len(tasks)]
        for name, value, interval in drawn_rows(panel, first):
            found[task, method, name] = value, interval
    assert found.keys() == wanted.keys()
    assert len(found) > (70 if size == 16 else 10)
    for key, (value, interval) in found.items():
        pairs = wanted[key]
        assert value == pytest.approx(mean(pairs), abs=1e-9)
        if len(pairs) < 3:
            assert interval is None
            continue
        margin = STUDENT[len(pairs) - 2] * stdev(pairs) / math.sqrt(len(pairs))
        low, high = value - margin, value + margin
        assert interval == pytest.approx((max(low, RANGE[0]), min(high, RANGE[1])))


def test_the_short_forest_is_part_of_the_whole() -> None:
    tasks = tasks_of([*read_runs(KEPT, Run).values()], 16)
    whole, short = draw_forest(tasks).axes, draw_in_short(tasks).axes
    shown = {}
    for panels in (whole, short):
        for number, panel in enumerate(panels):
            first = panels[number - number % len(tasks)]
            title = panel.get_title(loc="left")
            shown[panels is short, title] = [*drawn_rows(panel, first)]
    titles = {title for is_short, title in shown if is_short}
    # SSRT did not run ten times.
    assert len(titles) == 10
    assert not any("SSRT" in title for title in titles)
    wanted = ("gh", "ghpp", "sum x 2", "sum x 4")
    for title in titles:
        rows = [row for row in shown[False, title] if row[0] in wanted]
        assert shown[True, title] == rows
        assert {"sum x 2", "sum x 4"} < {name for name, *_ in rows}


def test_what_is_filled_and_bold_is_free_of_zero() -> None:
    runs = [run_of("sum", seed, 50.0 + seed) for seed in range(12)]
    runs += [run_of("gh", seed, 53.0 + seed + seed % 2) for seed in range(12)]
    runs += [run_of("ghpp", seed, 50.0 + 2 * (seed % 5)) for seed in range(12)]
    runs += [run_of("ghpp_printed", seed, 49.0 + seed) for seed in range(2)]
    runs += [run_of("minus_alignment", seed, 10.0) for seed in range(3)]
    (panel,) = draw_forest({"usps-mnist": runs}).axes
    inside = {
        panel.get_yticklabels()[int(ys(line)[0])].get_text():
            line.get_markerfacecolor()
        for line in panel.lines
        if line.get_marker() != "None"
    }  # fmt: skip
    assert inside["gh"] != "white"
    assert inside["ghpp"] == inside["ghpp_printed"] == "white"
    assert "minus_alignment" not in inside
    shown = {text.get_text(): text.get_fontweight() for text in panel.texts}
    assert shown["+3.5"] == "bold"
    assert shown["-1.0 (2)"] == "normal"


# The other pictures.


def test_the_paper_s_figures_and_ours_are_those_of_the_tables() -> None:
    runs = raw(16)
    tasks = tasks_of([*read_runs(KEPT, Run).values()], 16)
    panels = draw_table3(tasks).axes
    for column, task in enumerate(tasks):
        hollow, filled = (
            [
                xs(line)[0]
                for line in panels[column].lines
                if len(xs(line)) == 1
                and (line.get_markerfacecolor() == "white") is is_hollow
            ]
            for is_hollow in (True, False)
        )
        assert sorted(hollow) == sorted(
            value
            for (name, _), row in PAPER.items()
            if name == task
            for value in row.values()
        )
        assert sorted(filled) == pytest.approx(
            sorted(
                mean(one["accuracy"] for one in runs[task, method, rule, 1.0].values())
                for method in ("CDAN+E", "MCD", "GVB", "DWL", "SSRT")
                for rule in ("sum", "gh", "ghpp")
            )
        )
    gains = {
        round(xs(line)[0], 6)
        for panel in panels[len(tasks) :]
        for line in panel.lines
        if len(xs(line)) == 1 and line.get_markerfacecolor() == "white"
    }
    assert gains == {
        round(row[rule] - row["sum"], 6)
        for (task, _), row in PAPER.items()
        if task in tasks
        for rule in ("gh", "ghpp")
    }


def test_the_shares_of_obtuse_angles_are_the_runs_own() -> None:
    runs = raw(16)
    tasks = tasks_of([*read_runs(KEPT, Run).values()], 16)
    for panel, task in zip(draw_angles(tasks).axes, tasks, strict=True):
        points = [
            xs(line)[0]
            for line in panel.lines
            if line.get_marker() == "X" and len(xs(line)) == 1
        ]
        ours = [
            median(one["obtuse"] for one in runs[task, method, "sum", 1.0].values())
            for method in ("DANN", "CDAN+E", "MCD", "GVB", "DWL", "SSRT")
        ]
        theirs = [share for (name, _), share in PAPER_OBTUSE.items() if name == task]
        assert sorted(points) == pytest.approx(sorted([*ours, *theirs]))


def test_the_curves_are_the_means_over_the_seeds() -> None:
    runs = [run_of("sum", 0, 60.0), run_of("sum", 1, 70.0), run_of("gh", 0, 80.0)]
    runs += [run_of("sum", 0, 40.0, method="source-only")]
    (panel,) = draw_errors({"usps-mnist": runs}).axes
    curves = {line.get_label(): ys(line) for line in panel.lines}
    assert curves == {
        "source only": [90, 60],
        "plain sum": [90, 35],
        "GH": [90, 20],
    }


# The counts.


def test_a_difference_counts_from_ten_seeds_on() -> None:
    runs = [run_of("sum", seed, 50.0 + seed) for seed in range(10)]
    runs += [run_of("gh", seed, 53.0 + seed + seed % 2) for seed in range(10)]
    runs += [run_of("ghpp", seed, 49.0 + seed - seed % 2) for seed in range(10)]
    runs += [run_of("ghpp_printed", seed, 53.0) for seed in range(9)]
    runs += [run_of("sum", seed, 54.0 + seed, trade_off=2.0) for seed in range(10)]
    rows = [line.split() for line in format_verdict({"usps-mnist": runs}).splitlines()]
    assert rows[2:5] == [
        ["sum", "x", "2", "1", "1", "0", "+4.0", "+4.0", "+4.0"],
        ["gh", "1", "1", "0", "+3.5", "+3.5", "+3.5"],
        ["ghpp", "1", "0", "1", "-1.5", "-1.5", "-1.5"],
    ]
    assert larger_weights({"usps-mnist": runs}) == (1, 1)
    assert larger_weights({"usps-mnist": runs[:20]}) == (0, 0)


def test_the_largest_gain_is_named_with_its_interval_and_what_weights_do() -> None:
    seeds = range(10)
    sums = [run_of("sum", k, 50.0 + k) for k in seeds]
    heavy = [run_of("sum", k, 53.0 + k, trade_off=4.0) for k in seeds]
    rules = [run_of("gh", k, 52.0 + k + k % 2) for k in seeds]
    worse = [run_of("ghpp", k, 51.0 + k) for k in seeds]
    # Nine seeds do not count, nor does a rule beside a heavier loss.
    few = [run_of("gh", k, 90.0 + k, method="MCD") for k in seeds[:9]]
    few += [run_of("sum", k, 50.0 + k, method="MCD") for k in seeds[:9]]
    both = [run_of("gh", k, 80.0, trade_off=4.0) for k in seeds]
    runs = [*sums, *heavy, *rules, *worse, *few, *both]
    # 2.5 +- 2.262 * 0.527 / sqrt(10)
    assert largest_gain({"usps-mnist": runs}) == (
        "DWL from usps to mnist gains 2.5 points with gh (2.1 to 2.9, 10 paired seeds); "
        "the sum with a heavier alignment loss: +3.0 at 4 times the weight"
    )
    with pytest.raises(ValueError, match="no gain"):
        largest_gain({"usps-mnist": sums})


def test_runs_of_another_length_or_device_are_not_counted() -> None:
    runs = [run_of("sum", 0, 50.0), run_of("gh", 0, 51.0)]
    others = [run_of("gh", 1, 52.0, steps=8), replace(runs[1], device="cuda:0")]
    assert tasks_of([*runs, *others], 16) == {"usps-mnist": runs}
    with pytest.raises(ValueError, match="no runs of size 28"):
        tasks_of(runs, 28)


@pytest.mark.slow
def test_the_page_has_the_counts_and_pictures_that_the_command_makes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([])
    assert f"```text\n{capsys.readouterr().out}```" in README
    main(["--selected"])
    assert f"```text\n{capsys.readouterr().out}```" in README
    main(["--draw", str(tmp_path)])
    assert {path.stem for path in tmp_path.iterdir()} == PICTURES.keys()
    front = (DRAWN.parents[1] / "README.md").read_text(encoding="utf-8")
    for name in PICTURES:
        place = f"docs/pictures/{name}.svg)"
        assert f"](../../{place}" in README or f"]({place}" in front, name
        # Text is text: what another version of matplotlib draws has the same words.
        words = [
            re.findall(r"<text [^>]*>([^<]+)</text>", path.read_text(encoding="utf-8"))
            for path in (tmp_path / f"{name}.svg", DRAWN / f"{name}.svg")
        ]
        assert words[0] == words[1]
        assert len(words[0]) > 10


def test_pictures_of_the_page_have_words_for_who_does_not_see_them() -> None:
    alternatives = re.findall(r"!\[([^]]*)\]\(", README)
    assert len(alternatives) >= len(PICTURES) - 1  # one is of the front page
    assert all(len(words) > 60 for words in alternatives)


def test_a_store_without_runs_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "runs.jsonl"
    append_run(store, run_of("sum", 0, 50.0))
    with pytest.raises(SystemExit):
        verdict.main(["--store", str(store)])
    assert "no runs of size 28" in capsys.readouterr().err
