"""The figures: runs that are watched, kept and gone on with, and what is drawn of them."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from matplotlib.collections import Collection
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle, StepPatch
from torch import Tensor

import ghopt
from benchmarks.common.store import append_run, read_runs
from benchmarks.uda import figures
from benchmarks.uda.data import Task
from benchmarks.uda.figures import (
    embed_domains,
    main,
    make_configs,
    watch,
    whole_seeds,
)
from benchmarks.uda.methods.features import Seen, linear_mmd, max_j, sample_rows, see
from benchmarks.uda.methods.networks import CLASSES, Networks, build_networks
from benchmarks.uda.methods.rules import ALL_RULES, FLIPS, LAMBDAS, RULES, find_rule
from benchmarks.uda.methods.steps import Config
from benchmarks.uda.runs.records import Points, Result, key_of
from benchmarks.uda.runs.train import run
from benchmarks.uda.views.feature_plots import (
    SHOWN,
    SOURCE,
    TARGET,
    make_watched_figures,
)
from benchmarks.uda.views.plots import BINS, make_figures

CONFIG = Config("noise-noise", "CDAN+E", "gh", seed=0, steps=4, batch_size=8)
NAMES = {
    *("cosines.png", "inner-products.png", "test-error.png", "t-sne.png"),
    *("confusion.png", "balance.png", "sign-flips.png", "lambda.png"),
}


def watched_of(config: Config, accuracy: float) -> Result:
    """A run that was never trained; its place in the table is in its numbers."""
    sign = -1.0 if config.rule in ("sum", "gh") else 1.0
    pairs = [(1.0, sign, 4.0), (4.0, 1.0, 1.0), (9.0, 1.0, 1.0)]
    table = torch.eye(CLASSES).long() * 3
    table[2] = 0
    table[2, 7] = 9 if config.rule == "gh" else 1
    shift = 10.0 * list(RULES).index(config.rule) if config.rule in RULES else 0
    drawn = config.seed == 0 and config.rule in SHOWN
    return Result(
        asdict(config),
        [(0, 90.0), (4, 100 - accuracy)],
        before=[] if config.method == "source-only" else pairs,
        after=[] if config.method == "source-only" else pairs,
        null=pairs if config.rule == "sum" else [],
        key=key_of(config),
        balance=[(0, 1.0 + shift, 2.0, 3.0), (4, 4.0 + shift, 5.0, 6.0 + config.seed)],
        confusion=table.tolist(),
        points={"source": [(1, 2, 3), (1, 4, 3)], "target": [(shift, 6, 7)]}
        if drawn
        else {},
    )


def all_runs(
    accuracies: dict[str, list[float]], *, source_only: Sequence[float] = (40.0, 42.0)
) -> list[Result]:
    """Runs of MCD with 50 % but where said, by rule and seed, in no order of seeds."""
    configs = make_configs("a-b", ["MCD"], len(source_only), 4)
    return [
        watched_of(
            one,
            source_only[one.seed]
            if one.method == "source-only"
            else accuracies.get(one.rule, [50.0] * 9)[one.seed],
        )
        for one in reversed(configs)
    ]


@pytest.fixture
def in_process(task: Task, monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Train on noise in this process; what is trained is listed."""
    trained: list[Config] = []

    def start_pool(given: Task, workers: int) -> nullcontext[Task]:
        assert workers == 2
        return nullcontext(given)

    def finished(
        given: Task, configs: Sequence[Config], train: object
    ) -> Iterator[Result]:
        assert (given, train) == (task, watch)
        for config in configs:
            trained.append(config)
            yield watch(config, task)

    monkeypatch.setattr(figures, "start_pool", start_pool)
    monkeypatch.setattr(figures, "finished", finished)
    monkeypatch.setattr(figures, "load_task", lambda *_, **__: task)
    return trained


# Rules.


@pytest.mark.parametrize("lam", LAMBDAS)
def test_a_rule_of_lambda_is_ghpp_with_that_share(lam: float) -> None:
    gramian = torch.tensor([[1.0, -1.0], [-1.0, 4.0]])
    rule = find_rule(LAMBDAS[lam])
    assert rule.weighting(gramian).equal(ghopt.ghpp(gramian, lam))
    assert rule.coefficients(gramian).equal(ghopt.ghpp_coefficients(gramian, lam))
    # The share is the first task's: without one it keeps its gradient.
    kept: Tensor = (
        rule.coefficients(gramian).double().round(decimals=6).eq(torch.eye(2))
    )
    assert kept.all(1).tolist() == [lam == 0, lam == 1]


def test_every_rule_is_found_and_the_tables_have_those_of_old() -> None:
    assert all(find_rule(name) is rule for name, rule in ALL_RULES.items())
    assert list(ALL_RULES) == [
        *("sum", "gh", "ghpp", "ghpp_printed", "gh_projected", "ghpp_balanced"),
        *("minus_alignment", "minus_classification"),
    ]


# Runs.


def test_every_seed_has_every_run_that_the_figures_need_once() -> None:
    configs = make_configs("a-b", ["CDAN+E", "MCD"], 2, 7)
    assert len({key_of(one) for one in configs}) == len(configs) == 2 * (1 + 2 * 10)
    assert [one.seed for one in configs] == sorted(one.seed for one in configs)
    for method in ("CDAN+E", "MCD"):
        rules = {one.rule for one in configs if one.method == method}
        assert rules == {*RULES, *FLIPS, *LAMBDAS.values()}
    assert {one.steps for one in configs} == {7}


@pytest.mark.parametrize("method", ["source-only", "CDAN+E", "MCD", "DWL"])
def test_watching_changes_nothing_in_training(task: Task, method: str) -> None:
    config = replace(CONFIG, method=method, rule="sum")
    plain, watched = run(config, task), watch(config, task)
    assert watched.errors == plain.errors
    assert watched.before == plain.before
    assert watched.null == plain.null


def test_a_watched_run_keeps_what_its_networks_were(task: Task) -> None:
    watched = watch(CONFIG, task)
    assert watched.key == key_of(CONFIG)
    assert [row[0] for row in watched.balance] == [step for step, _ in watched.errors]
    networks = build_networks(CONFIG.method, CONFIG.seed)
    source = see(networks, task.source.images)
    target = see(networks, task.target)
    assert watched.balance[0][1:] == pytest.approx(
        (
            linear_mmd(source.features, target.features),
            max_j(source.features, task.source.labels, CLASSES),
            max_j(target.features, target.predicted, CLASSES),
        ),
        rel=1e-3,
    )
    assert watched.balance[0] != watched.balance[-1]
    confusion = torch.tensor(watched.confusion)
    assert confusion.sum(1).equal(task.test.labels.bincount(minlength=CLASSES))
    assert 100 * confusion.trace() / 32 == pytest.approx(watched.accuracy)
    for domain, labels in (
        ("source", task.source.labels),
        ("target", task.test.labels),
    ):
        points = watched.points[domain]
        assert sorted(c for _, _, c in points) == sorted(labels.tolist())
        assert all(math.isfinite(x) and math.isfinite(y) for x, y, _ in points)


def test_only_the_first_seed_of_the_rules_that_are_drawn_is_embedded(
    task: Task,
) -> None:
    assert watch(replace(CONFIG, rule="ghpp"), task).points
    assert not watch(replace(CONFIG, seed=1), task).points
    assert not watch(replace(CONFIG, rule="ghpp_printed"), task).points


def test_every_point_has_the_label_of_its_own_image(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample of each domain, as the trained networks see it."""
    trained: list[Networks] = []
    given: list[Mapping[str, tuple[Tensor, Tensor]]] = []

    def note_networks(networks: Networks, images: Tensor) -> Seen:
        trained.append(networks)
        return see(networks, images)

    def note_domains(
        domains: Mapping[str, tuple[Tensor, Tensor]],
    ) -> dict[str, Points]:
        given.append(domains)
        return {}

    monkeypatch.setattr(figures, "POINTS", 5)
    monkeypatch.setattr(figures, "see", note_networks)
    monkeypatch.setattr(figures, "embed_domains", note_domains)
    watch(CONFIG, task)
    for name, domain in (("source", task.source), ("target", task.test)):
        features, labels = given[0][name]
        chosen = sample_rows(len(domain.images), 5)
        assert not chosen.equal(torch.arange(5))
        whole = see(trained[-1], domain.images).features
        torch.testing.assert_close(features, whole[chosen])
        assert labels.equal(domain.labels[chosen])


def test_the_domains_share_a_plane_and_keep_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(figures, "embed", lambda features: features[:, :2])
    features = torch.arange(15.0).reshape(5, 3)
    labels = torch.tensor([7, 3, 9, 1, 4])
    assert embed_domains(
        {"source": (features[:2], labels[:2]), "target": (features[2:], labels[2:])}
    ) == {
        "source": [(0, 1, 7), (3, 4, 3)],
        "target": [(6, 7, 9), (9, 10, 1), (12, 13, 4)],
    }


# The store.


def test_a_watched_run_comes_back_from_the_store(task: Task, tmp_path: Path) -> None:
    store = tmp_path / "runs.jsonl"
    watched = watch(CONFIG, task)
    append_run(store, watched)
    again = read_runs(store, Result)[key_of(CONFIG)]
    assert json.dumps(asdict(again)) == json.dumps(asdict(watched))


def test_only_whole_seeds_are_drawn() -> None:
    configs = make_configs("a-b", ["MCD"], 2, 4)
    known = {key_of(one): watched_of(one, 50) for one in configs}
    assert len(whole_seeds(known, configs)) == 22
    last = known.pop(key_of(configs[-1]))
    assert {one.config["seed"] for one in whole_seeds(known, configs)} == {0}
    # Whose points are drawn.
    known[last.key] = last
    del known[key_of(configs[3])]
    with pytest.raises(ValueError, match="lacks runs of seed 0"):
        whole_seeds(known, configs)


def test_the_command_trains_what_is_missing_and_draws_whole_seeds(
    in_process: list[Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawn: list[int] = []

    def note(runs: Sequence[Result], directory: Path) -> list[Path]:
        drawn.append(len(runs))
        return [directory / f"{len(drawn)}.png"]

    monkeypatch.setattr(figures, "draw_all", note)
    monkeypatch.setattr(figures, "draw_watched", note)
    out = tmp_path / "new"
    asked = ["--methods", "MCD", "--steps", "1", "--out", str(out), "--seeds"]
    main([*asked, "1"])
    assert len(in_process) == 11
    assert f"1 of 1 seeds, 1 steps. Wrote 1.png, 2.png to {out}/" in (
        capsys.readouterr().out
    )
    store = out / "runs.jsonl"
    store.write_text(
        store.read_text(encoding="utf-8")[:-9], encoding="utf-8"
    )  # killed while it wrote
    main([*asked, "1"])
    assert in_process[11:] == [in_process[10]]
    main([*asked, "2", "--show"])
    assert len(in_process) == 12
    assert "1 of 2 seeds" in capsys.readouterr().out
    assert drawn == [11] * 6


@pytest.mark.parametrize(
    ("arguments", "defaults"),
    [
        ([], (3, 300, "mnist5k-digits")),
        (["--quick"], (1, 20, "mnist5k-digits")),
        (["--data", "somewhere"], (3, 1000, "usps-mnist")),
        (["--quick", "--seeds", "2", "--steps", "7"], (2, 7, "mnist5k-digits")),
    ],
)
def test_the_defaults_are_those_of_the_help(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    defaults: tuple[int, int, str],
) -> None:
    asked: list[Config] = []

    def note(_: object, configs: Sequence[Config]) -> list[Result]:
        asked.extend(configs)
        raise ValueError("enough")

    monkeypatch.setattr(figures, "whole_seeds", note)
    with pytest.raises(SystemExit):
        main(["--show", "--out", str(tmp_path), *arguments])
    assert {one.method for one in asked} == {"source-only", "CDAN+E", "MCD"}
    assert (len({one.seed for one in asked}), asked[0].steps, asked[0].task) == defaults


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds: invalid value: 0"),
        (["--methods", "source-only"], "invalid choice: 'source-only'"),
        (["--task", "usps-mnist"], "needs --data DIR"),
        (["--show"], "lacks runs of seed 0: train without --show"),
    ],
)
def test_the_command_names_what_is_wrong(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_the_quick_command_draws_all_figures_in_worker_processes(
    tmp_path: Path,
) -> None:
    main(["--quick", "--steps", "2", "--methods", "CDAN+E", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == NAMES | {"runs.jsonl"}
    configs = [
        one.config for one in read_runs(tmp_path / "runs.jsonl", Result).values()
    ]
    assert {(one["seed"], one["steps"], one["task"]) for one in configs} == {
        (0, 2, "mnist5k-digits")
    }


# What is drawn.


def x_of(line: Line2D) -> list[float]:
    return [float(x) for x in np.asarray(line.get_xdata())]


def y_of(line: Line2D) -> list[float]:
    return [float(y) for y in np.asarray(line.get_ydata())]


def points_of(collection: Collection) -> list[list[float]]:
    return [[float(x), float(y)] for x, y in np.asarray(collection.get_offsets())]


def test_the_flips_bars_are_mean_accuracies_with_a_dot_for_each_seed() -> None:
    runs = all_runs(
        {"sum": [50, 54], "gh": [55, 57], "minus_alignment": [30, 32]},
        source_only=[40, 44],
    )
    (axes,) = make_watched_figures(runs)["sign-flips"].axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    bars = [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)]
    assert dict(zip(names, bars, strict=True)) == {
        "source only": 42,
        "plain sum": 52,
        "GH": 56,
        "GH++": 50,
        "-g1, +g2": 31,
        "+g1, -g2": 50,
    }
    assert sorted(x_of(axes.lines[2])) == [55, 57]


def test_gains_by_lambda_are_paired_by_seed() -> None:
    runs = all_runs(
        {
            "sum": [50, 60],
            "ghpp_lam_0": [52, 61],
            "ghpp": [49, 62],
            "ghpp_lam_1": [50, 60],
        }
    )
    (axes,) = make_watched_figures(runs)["lambda"].axes
    first, second, middle, _ = map(y_of, axes.lines)
    assert first == [2, 0, -1, 0, 0]
    assert second == [1, -10, 2, -10, 0]
    assert middle == [mean(pair) for pair in zip(first, second, strict=True)]
    assert x_of(axes.lines[2]) == [0, 0.25, 0.5, 0.75, 1]
    assert axes.get_title() == "MCD (sum: 55.0 %)"


def test_the_balance_has_a_panel_for_each_quantity_and_a_line_for_each_rule() -> None:
    panels = make_watched_figures(all_runs({}))["balance"].axes
    assert [axes.get_title() for axes in panels] == [
        "linear MMD (less: domains nearer)",
        "max J(W) of the source",
        "max J(W) of the target as predicted",
    ]
    assert panels[0].get_ylabel() == "MCD"
    found = [[y_of(line) for line in axes.lines] for axes in panels]
    assert found == [
        [[1, 4], [11, 14], [21, 24]],
        [[2, 5]] * 3,
        [[3, 6.5]] * 3,  # the mean over two seeds
    ]
    assert x_of(panels[0].lines[0]) == [0, 4]


def test_a_confusion_matrix_is_in_percent_of_the_true_class_over_all_seeds() -> None:
    panels = make_watched_figures(all_runs({}))["confusion"].axes
    assert [axes.get_title() for axes in panels] == [
        "MCD, plain sum",
        "MCD, GH",
        "MCD, GH++",
    ]
    shares = np.asarray(panels[0].images[0].get_array())
    assert shares.sum(1).tolist() == [100] * CLASSES
    texts = {text.get_position(): text.get_text() for text in panels[0].texts}
    assert texts[7, 2] == "100"  # x is the predicted class
    assert (2, 2) not in texts


def test_each_rule_s_points_are_drawn_in_their_domain_s_color() -> None:
    panels = make_watched_figures(all_runs({"gh": [61, 99]}))["t-sne"].axes
    assert panels[1].get_title() == "MCD, GH: 61 %"
    source, target = panels[1].collections
    assert points_of(source) == [[1, 2], [1, 4]]
    assert points_of(target) == [[10, 6]]
    for domain, color in ((source, SOURCE), (target, TARGET)):
        assert np.asarray(domain.get_facecolor())[0, :3] == pytest.approx(
            to_rgba(color)[:3]
        )
    (digit,) = panels[1].texts
    assert digit.get_text() == "3"


def test_a_run_that_diverged_does_not_stop_the_drawing(tmp_path: Path) -> None:
    broken = [(math.nan, math.nan, 3)] * 2
    runs = [
        replace(
            one,
            balance=[(0, 1.0, 2.0, 3.0), (4, math.nan, math.nan, math.nan)],
            points={"source": broken, "target": broken} if one.points else {},
        )
        if one.rule == "gh"
        else one
        for one in all_runs({})
    ]
    for name, figure in make_watched_figures(runs).items():
        figure.savefig(tmp_path / name, format="png")


def test_histograms_are_before_as_bars_after_as_stairs_and_the_null_as_a_line() -> None:
    # Three places on the axis, each taken by one of the three.
    runs = [
        replace(
            one,
            before=[(1.0, -0.9, 4.0), (4.0, 2.0, 1.0)] if one.before else [],
            after=[(1.0, 0.5, 4.0)] if one.before else [],
            null=[(1.0, -0.25, 4.0)] if one.null else [],
        )
        for one in all_runs({})
    ]
    for name, values in (
        ("cosines", (-0.45, 1.0, 0.25, -0.125)),
        ("inner-products", (-0.9, 2.0, 0.5, -0.25)),
    ):
        axes = make_figures(runs)[name].axes[0]
        title = axes.get_title()
        assert "MCD, GH\nobtuse: 50 %, then 0 % (null 100 %)" in title
        assert "|g1|/|g2|: 1.250 (median, before)" in title
        bars = [one for one in axes.patches if isinstance(one, Rectangle)]
        width = bars[0].get_width()

        def place(value: float, width: float = width) -> int:
            return min(BINS - 1, int(value / width + BINS / 2))

        heights = [one.get_height() for one in bars]
        assert np.flatnonzero(heights).tolist() == [place(one) for one in values[:2]]
        (stairs,) = (one for one in axes.patches if isinstance(one, StepPatch))
        steps, _, _ = stairs.get_data()
        assert np.flatnonzero(steps).tolist() == [place(values[2])]
        null = y_of(axes.lines[0])
        assert np.flatnonzero(null).tolist() == [place(values[3])]


def test_a_run_that_diverged_has_a_share_of_what_it_had() -> None:
    runs = [
        replace(one, before=[*one.before, (math.nan,) * 3]) if one.before else one
        for one in all_runs({})
    ]
    title = make_figures(runs)["cosines"].axes[0].get_title()
    assert "obtuse: 33 %, then" in title


def test_test_errors_are_means_over_seeds_by_rule() -> None:
    runs = all_runs({"sum": [50, 54], "gh": [60, 66], "ghpp": [70, 70]})
    (axes,) = make_figures(runs)["test-error"].axes
    found = {line.get_label(): (x_of(line), y_of(line)) for line in axes.lines}
    assert found == {
        "source only": ([0, 4], [90, 59]),
        "plain sum": ([0, 4], [90, 48]),
        "GH": ([0, 4], [90, 37]),
        "GH++": ([0, 4], [90, 30]),
        "GH++ as printed": ([0, 4], [90, 50]),
    }
    band = axes.collections[2].get_paths()[0].get_extents()
    spread = math.sqrt(18)
    assert (band.y0, band.ymax) == pytest.approx((37 - spread, 90), rel=1e-4)


def test_histograms_say_how_long_the_first_gradient_is() -> None:
    for name in ("cosines", "inner-products"):
        title = make_figures(all_runs({}))[name].axes[0].get_title()
        assert "obtuse: 33 %, then 33 % (null 33 %)" in title
        assert "|g1|/|g2|: 2.000 (median, before)" in title
