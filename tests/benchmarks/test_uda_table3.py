"""Table 3: runs that are kept, gone on with and never mixed, and what is said of them."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import permutations
from pathlib import Path
from statistics import mean, median

import pytest
import torch

from benchmarks.common.store import append_run, hash_of, read_runs
from benchmarks.uda import table3
from benchmarks.uda.data import SHA256, Task
from benchmarks.uda.methods.rules import ALL_RULES
from benchmarks.uda.methods.steps import ALL_METHODS, REVISIONS, Config
from benchmarks.uda.runs.configs import make_configs
from benchmarks.uda.runs.records import KEPT, Result, Run, key_of, summarize
from benchmarks.uda.runs.train import run
from benchmarks.uda.table3 import BATCH, RATE, main, train
from benchmarks.uda.views.paper_table import (
    PAPER,
    describe_oracle,
    format_angles,
    format_layout,
    format_table,
)

CONFIG = Config("usps-mnist", "DANN", "sum", seed=0, steps=7, batch_size=8)


def run_of(
    rule: str = "sum", seed: int = 0, accuracy: float = 50.0, **other: object
) -> Run:
    config = replace(CONFIG, rule=rule, seed=seed, **other)  # type: ignore[arg-type]  # by name
    return Run(
        key=key_of(config),
        config=asdict(config),
        torch="2",
        accuracy=accuracy,
        selected=48.0,
        obtuse=60.0,
        cosine=-0.05,
        ratio=0.25,
        null=50.0,
        errors=json.loads(f"[[7, {100 - accuracy}]]"),  # lists, as the store has them
        validation=[],
    )


def lines(runs: Sequence[Run]) -> list[list[str]]:
    return [line.split() for line in format_table(runs).splitlines()[2:]]


# Runs.


def test_every_seed_has_every_rule_and_the_sum_at_every_weight() -> None:
    configs = make_configs(CONFIG, ["source-only", "MCD"], ALL_RULES, 2)
    common = ("task", "steps", "batch_size", "size")
    for name in common:
        assert {asdict(one)[name] for one in configs} == {asdict(CONFIG)[name]}
    assert len({key_of(one) for one in configs}) == len(configs)
    for seed in (0, 1):
        own = [one for one in configs if one.seed == seed]
        assert {one.rule for one in own if one.method == "MCD"} == ALL_RULES.keys()
        sums = [
            one.trade_off for one in own if (one.method, one.rule) == ("MCD", "sum")
        ]
        assert sums == [1, 2, 4]
        assert sum(one.method == "source-only" for one in own) == 1
    # A seed is whole before the next begins: what is there is always paired.
    assert [one.seed for one in configs] == sorted(one.seed for one in configs)


def test_weights_that_are_asked_for_are_those_of_every_rule() -> None:
    configs = make_configs(CONFIG, ["source-only", "MCD"], ["sum", "gh"], 1, [1.0, 3.0])
    assert [(one.method, one.rule, one.trade_off) for one in configs] == [
        ("source-only", "sum", 1),
        ("MCD", "sum", 1),
        ("MCD", "sum", 3),
        ("MCD", "gh", 1),
        ("MCD", "gh", 3),
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"steps": 8},
        {"trade_off": 2.0},
        {"batch_size": 9},
        {"lr": 0.01},
        {"rule": "gh"},
        {"size": 28},
    ],
)
def test_runs_of_other_settings_have_other_keys(other: dict[str, object]) -> None:
    assert key_of(replace(CONFIG, **other)) != key_of(CONFIG)  # type: ignore[arg-type]  # by name


def test_runs_on_other_data_have_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(CONFIG)
    monkeypatch.setitem(SHA256, "usps.npz", "0" * 64)
    assert key_of(CONFIG) != before


def test_runs_of_a_method_that_once_was_another_have_other_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = [key_of(replace(CONFIG, method=name)) for name in ("DANN", "MCD")]
    monkeypatch.setitem(REVISIONS, "DANN", 2)
    assert key_of(CONFIG) != before[0]
    assert key_of(replace(CONFIG, method="MCD")) == before[1]
    # But for the revision, a run is what its line says.
    assert CONFIG.settings() == asdict(CONFIG) | {"revision": 2}


def test_a_run_is_kept_as_it_was_found(task: Task) -> None:
    # Selected is by images of the source, which are not those that are tested.
    validated = replace(task, validation=task.source)
    result = run(CONFIG, validated)
    kept = summarize(result, torch.device("cpu"))
    assert kept.accuracy == result.accuracy
    assert kept.errors == run(CONFIG, task).errors
    assert kept.validation == run(CONFIG, replace(task, test=task.source)).errors
    assert kept.validation != kept.errors
    assert kept.null is not None
    assert kept.config == asdict(CONFIG)
    assert kept.device == "cpu"
    obtuse = [product < -1e-9 * math.sqrt(a * b) for a, product, b in result.before]
    assert kept.obtuse == pytest.approx(100 * mean(obtuse))
    # In the first step the reversal's coefficient is 0, and so is g1.
    cosines = [0.0, *(d / math.sqrt(a * b) for a, d, b in result.before[1:])]
    assert kept.cosine == pytest.approx(mean(cosines))
    ratios = [math.sqrt(a / b) for a, _, b in result.before]
    assert kept.ratio == pytest.approx(median(ratios))
    unrelated = [product < -1e-9 * math.sqrt(a * b) for a, product, b in result.null]
    assert kept.null == pytest.approx(100 * mean(unrelated))
    alone = summarize(
        run(replace(CONFIG, method="source-only"), task), torch.device("cpu")
    )
    assert (alone.obtuse, alone.cosine, alone.null) == (None, None, None)
    assert math.isnan(alone.selected)


def test_the_angles_that_are_kept_are_those_before_harmonization(task: Task) -> None:
    result = run(replace(CONFIG, rule="gh", steps=12), task)
    assert result.before != result.after
    kept = summarize(result, torch.device("cpu"))
    assert kept.obtuse == pytest.approx(
        100 * mean(product < 0 for _, product, _ in result.before)
    )
    assert kept.obtuse != 0
    assert kept.null is None


def test_a_run_that_diverged_has_no_share_of_obtuse_angles() -> None:
    rows = [(1.0, -0.5, 1.0), (math.nan, math.nan, math.nan)]
    result = Result(CONFIG.settings(), [(0, 90.0)], rows, rows, [])
    kept = summarize(result, torch.device("cpu"))
    for value in (kept.obtuse, kept.cosine, kept.ratio):
        assert value is not None
        assert math.isnan(value)
    # Nor has a row, whatever the order of its seeds.
    for runs in permutations([kept, run_of(seed=1), run_of(seed=2)]):
        assert format_angles(runs).split()[-4:] == ["nan", "+nan", "nan", "50"]


def test_the_selected_accuracy_is_that_of_the_least_source_error_the_last_such() -> (
    None
):
    errors = [(0, 90.0), (5, 30.0), (10, 20.0), (15, 40.0)]
    validation = [(0, 80.0), (5, 10.0), (10, 10.0), (15, 12.0)]
    result = Result({}, errors, [], [], [], validation)
    assert result.selected == 80
    assert result.accuracy == 60


# The store.


@pytest.mark.slow
def test_runs_are_trained_and_appended(task: Task, tmp_path: Path) -> None:
    store = tmp_path / "runs.jsonl"
    configs = [CONFIG, replace(CONFIG, rule="minus_alignment")]
    train(task, configs, store, workers=1)
    runs = read_runs(store, Run)
    assert runs.keys() == {key_of(one) for one in configs}
    again = summarize(run(CONFIG, task), torch.device("cpu"))
    kept = runs[again.key]
    assert kept.accuracy == again.accuracy
    assert kept.cosine == again.cosine
    assert kept.device == "cpu"


def test_only_what_the_store_lacks_is_trained(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: Task,
) -> None:
    store = tmp_path / "runs.jsonl"
    trained: list[Config] = []

    def note(_: object, configs: list[Config], where: Path, workers: int) -> None:
        assert (where, workers) == (store, 1)
        trained.extend(configs)
        for config in configs:
            kept = run_of()
            append_run(where, replace(kept, key=key_of(config), config=asdict(config)))

    monkeypatch.setattr(table3, "train", note)
    monkeypatch.setattr(table3, "load_task", lambda *_, **__: task)
    asked = ["--tasks", "usps-mnist", "--methods", "DANN", "--rules", "sum", "gh"]
    asked += ["--steps", "7", "--workers", "1", "--store", str(store)]
    main([*asked, "--seeds", "1"])
    assert len(trained) == 4
    main([*asked, "--seeds", "2"])
    assert [one.seed for one in trained[4:]] == [1] * 4
    main([*asked, "--seeds", "3", "--show"])
    assert len(trained) == 8
    assert capsys.readouterr().out.count("DANN    gh") == 2 * 3  # of two tables each
    main([*asked, "--seeds", "1", "--size", "28"])
    assert [one.size for one in trained[8:]] == [28] * 4
    assert "usps-mnist, 28x28, 7 steps" in capsys.readouterr().out


def test_a_quick_run_needs_no_data_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained: list[Config] = []
    stores: list[Path] = []

    def note(task: Task, configs: list[Config], store: Path, _workers: int) -> None:
        assert task.validation is None
        trained.extend(configs)
        stores.append(store)
        append_run(store, replace(run_of(), key=key_of(configs[0])))

    monkeypatch.setattr(table3, "train", note)
    store = tmp_path / "runs.jsonl"
    main(["--quick", "--data", str(tmp_path), "--store", str(store)])
    assert {one.method for one in trained} == set(ALL_METHODS)
    assert {(one.task, one.seed) for one in trained} == {("mnist5k-digits", 0)}
    assert not store.exists()
    assert not any(one.exists() for one in stores)


def test_without_validation_nothing_is_selected() -> None:
    kept = replace(run_of(accuracy=50), selected=math.nan)
    assert " ".join(lines([kept])[0]).startswith("DANN sum 50.0 (1) - -")


def test_runs_of_other_settings_are_not_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "runs.jsonl"
    base = replace(CONFIG, batch_size=BATCH, lr=RATE)
    (config,) = make_configs(base, ["source-only"], [], 1)
    for settings, accuracy in (({}, 51.0), ({"lr": 0.5}, 99.0), ({"steps": 8}, 99.0)):
        other = replace(config, **settings)
        kept = run_of(accuracy=accuracy)
        append_run(store, replace(kept, key=key_of(other), config=asdict(other)))
    asked = ["--tasks", "usps-mnist", "--methods", "source-only", "--steps", "7"]
    main([*asked, "--show", "--store", str(store)])
    shown = capsys.readouterr().out
    assert "51.0 (1)" in shown
    assert "would add 0.0 points" in shown
    assert "99.0" not in shown


def test_missing_data_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([], "needs --data DIR"),
        (["--data", str(tmp_path)], "usps.npz is missing"),
        (["--seeds", "0"], "must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(["--store", str(tmp_path / "none.jsonl"), *arguments])
        assert message in capsys.readouterr().err


def test_what_is_trained_is_where_it_was_asked_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: Task,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: list[torch.device] = []

    def note(task: Task, configs: list[Config], store: Path, _workers: int) -> None:
        given.append(task.target.device)
        for config in configs:
            device, settings = task.target.device, config.settings()
            key = key_of(config, device)
            result = Result(settings, [(0, 90.0)], [], [], [], key=key)
            append_run(store, summarize(result, device))

    monkeypatch.setattr(table3, "train", note)
    monkeypatch.setattr(table3, "load_task", lambda *_, **__: task)
    asked = ["--tasks", "usps-mnist", "--methods", "DANN", "--seeds", "1", "--store"]
    main([*asked, str(tmp_path / "a.jsonl")])
    main([*asked, str(tmp_path / "b.jsonl"), "--device", "meta"])
    assert given == [torch.device("cpu"), torch.device("meta")]
    for name, device in (("a", "cpu"), ("b", "meta")):
        main([*asked, str(tmp_path / f"{name}.jsonl"), "--device", device])
    assert len(given) == 2
    # Another device drops other units: no pairs are made with what the first has kept.
    main([*asked, str(tmp_path / "a.jsonl"), "--device", "meta"])
    assert given[2:] == [torch.device("meta")]
    with pytest.raises(SystemExit):
        main([*asked, str(tmp_path / "c.jsonl"), "--device", "abacus"])
    assert "invalid value: abacus" in capsys.readouterr().err


# The table.


def test_differences_are_paired_by_seed_and_have_an_interval() -> None:
    plain = [run_of(seed=seed, accuracy=50.0 + 9 * seed) for seed in range(5)]
    better = [
        run_of("gh", seed, 52.0 + 9 * seed + 0.5 * (seed % 2))
        for seed in reversed(range(5))
    ]
    table = lines([*plain, *better])
    assert table[0][:6] == ["DANN", "sum", "68.0", "+-", "14.2", "(5)"]
    assert " ".join(table[1]).startswith(
        "DANN gh 70.2 +- 14.2 (5) 48.0 +- 0.0 +2.2 [+1.9, +2.5]"
    )


def test_differences_can_be_those_of_the_selected_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = replace(CONFIG, batch_size=BATCH, lr=RATE)
    store = tmp_path / "runs.jsonl"
    for rule, last, selected in (("sum", 50.0, 41.0), ("gh", 53.0, 48.5)):
        config = replace(base, rule=rule)
        kept = replace(run_of(rule, accuracy=last), selected=selected)
        append_run(store, replace(kept, key=key_of(config), config=config.settings()))
    asked = ["--tasks", "usps-mnist", "--methods", "DANN", "--steps", "7", "--show"]
    asked += ["--store", str(store)]
    main(asked)
    shown = capsys.readouterr().out
    assert " 53.0 (1)      48.5              +3.0 " in shown
    assert "minus sum: of the last step, paired" in shown
    main([*asked, "--selected"])
    shown = capsys.readouterr().out
    assert " 53.0 (1)      48.5              +7.5 " in shown
    assert "minus sum: of the selected steps, paired" in shown
    # Where nothing was selected there is nothing to compare.
    bare = [replace(one, selected=math.nan) for one in read_runs(store, Run).values()]
    assert "53.0 (1) - - -" in " ".join(
        format_table(bare, "selected").splitlines()[-1].split()
    )


def test_the_layout_of_the_paper_s_table_has_a_column_for_each_task() -> None:
    def runs(task: str, method: str, rule: str, *found: float) -> list[Run]:
        return [
            run_of(rule, seed, accuracy, task=task, method=method)
            for seed, accuracy in enumerate(found)
        ]

    one = runs("usps-mnist", "MCD", "gh", 90.0, 92.0)
    one += runs("usps-mnist", "source-only", "sum", 40.0)
    one += runs("usps-mnist", "MCD", "minus_alignment", 10.0)
    one += [run_of("sum", 0, 99.0, method="MCD", trade_off=2.0)]
    other = runs("mnist-usps", "MCD", "gh", 80.0) + runs(
        "mnist-usps", "DANN", "sum", 70
    )
    table = format_layout({"usps-mnist": one, "mnist-usps": other}).splitlines()
    assert table[0].split() == [
        *(
            "method",
            "rule",
            "usps-mnist",
            "paper",
            "mnist-usps",
            "paper",
            "mean",
            "paper",
        )
    ]
    assert [" ".join(line.split()) for line in table[2:]] == [
        "source-only - 40.0 (1) - - - - -",
        "DANN sum - - 70.0 (1) - - -",
        # 96.75 is the mean of the paper's 96.8 and 96.7.
        "MCD gh 91.0 +- 1.4 (2) 96.8 80.0 (1) 96.7 85.5 96.8",
    ]


def test_seeds_that_the_sum_lacks_do_not_count_in_the_difference() -> None:
    runs = [run_of(seed=s, accuracy=50) for s in range(5)]
    runs += [run_of("gh", s, 51.0 if s < 5 else 99.0) for s in range(7)]
    assert "+1.0 [+1.0, +1.0]" in " ".join(lines(runs)[1])


def test_a_larger_weight_is_a_row_of_its_own() -> None:
    runs = [run_of(accuracy=50), run_of(accuracy=53, trade_off=2.0)]
    table = [" ".join(line) for line in lines(runs)]
    assert len(table) == 2
    assert table[1].startswith("DANN sum x 2 53.0 (1)")
    assert table[1].endswith("48.0 +3.0 -")


def test_a_rule_at_a_larger_weight_is_compared_with_the_sum_at_that_weight() -> None:
    runs = [run_of(accuracy=50), run_of(accuracy=53, trade_off=2.0)]
    runs += [run_of("gh", accuracy=51), run_of("gh", accuracy=55, trade_off=2.0)]
    table = [" ".join(line) for line in lines(runs)]
    assert [line.split("(1)")[0] for line in table] == [
        "DANN sum 50.0 ",
        "DANN sum x 2 53.0 ",
        "DANN gh 51.0 ",
        "DANN gh x 2 55.0 ",
    ]
    assert table[0].endswith("48.0 - -")
    for line, difference in zip(table[1:], ("+3.0", "+1.0", "+2.0"), strict=True):
        assert line.endswith(f"48.0 {difference} -")
    # Without such a sum there is nothing to compare with.
    assert "+2.0" not in format_table(runs[:1] + runs[3:])


def test_what_the_paper_s_choice_of_the_step_would_add_is_said() -> None:
    errors = [(0, 90.0), (3, 40.0), (7, 45.0)]
    runs = [replace(run_of(accuracy=55), errors=errors), run_of(accuracy=70)]
    assert "would add 2.5 points in the mean, 5.0 at most" in describe_oracle(runs)


def test_a_run_with_a_changed_sign_has_no_part_in_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = replace(CONFIG, batch_size=BATCH, lr=RATE)
    store = tmp_path / "runs.jsonl"
    for rule, best in (("sum", 49.0), ("minus_alignment", 9.0)):
        config = replace(base, rule=rule)
        kept = replace(run_of(rule, accuracy=50), errors=[(3, best), (7, 50.0)])
        append_run(store, replace(kept, key=key_of(config), config=asdict(config)))
    asked = ["--tasks", "usps-mnist", "--methods", "DANN", "--steps", "7", "--show"]
    main([*asked, "--store", str(store)])
    assert "would add 1.0 points in the mean, 1.0 at most" in capsys.readouterr().out
    main([*asked, "--store", str(store), "--rules", "minus_alignment"])
    assert "would add" not in capsys.readouterr().out


def test_the_store_s_folder_is_made_before_the_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: Task,
) -> None:
    monkeypatch.setattr(table3, "load_task", lambda *_, **__: task)
    monkeypatch.setattr(
        table3, "train", lambda _task, _configs, store, _: append_run(store, run_of())
    )
    store = tmp_path / "not" / "yet" / "runs.jsonl"
    main(["--tasks", "usps-mnist", "--methods", "DANN", "--store", str(store)])
    assert store.exists()
    with pytest.raises(SystemExit):
        main(["--tasks", "usps-mnist", "--store", str(store / "runs.jsonl")])
    assert "runs.jsonl" in capsys.readouterr().err


def test_few_differences_have_no_interval() -> None:
    def row(seeds: int) -> str:
        runs = [run_of(rule, seed) for rule in ("sum", "gh") for seed in range(seeds)]
        return " ".join(lines(runs)[1])

    assert row(2).endswith("48.0 +- 0.0 +0.0 -")
    assert row(3).endswith("48.0 +- 0.0 +0.0 [+0.0, +0.0] -")


def test_the_angles_are_medians_over_the_seeds_of_methods_with_two_losses() -> None:
    runs = [replace(run_of(seed=seed), obtuse=40.0 + seed**2) for seed in range(3)]
    runs += [replace(run_of("gh"), null=None), run_of(method="source-only")]
    rows = [line.split() for line in format_angles(runs).splitlines()[2:]]
    assert rows == [
        ["DANN", "sum", "41", "-0.050", "0.250", "50"],
        ["DANN", "gh", "60", "-0.050", "0.250", "-"],
    ]


def test_the_paper_s_figures_stand_beside_ours() -> None:
    config = replace(CONFIG, method="MCD", rule="gh")
    kept = replace(run_of(), key=key_of(config), config=asdict(config))
    assert lines([kept])[0][-1] == f"{PAPER['usps-mnist', 'MCD']['gh']:.1f}" == "96.8"
    assert lines([run_of("ghpp")])[0][-1] == "-"


def test_the_committed_runs_can_be_read_and_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = read_runs(KEPT, Run)
    assert runs
    for key, kept in runs.items():
        # What a line says is what its hash is of, and what the code would train today.
        assert key == hash_of(kept.config, SHA256)
        fields = {name: one for name, one in kept.config.items() if name != "revision"}
        assert kept.config == Config(**fields).settings()  # type: ignore[arg-type]  # by name
    main(["--show", "--seeds", "1"])
    shown = capsys.readouterr().out
    for method, rule in {
        (str(r.config["method"]), str(r.config["rule"])) for r in runs.values()
    }:
        if method != "source-only":
            assert f"{method} " in shown
            assert rule in shown
    json.dumps([asdict(kept) for kept in runs.values()])


COMMANDS = re.findall(
    r"`python -m benchmarks\.uda\.table3 (--show[^`]*)`:\n\n```text\n(.*?)```",
    KEPT.with_name("README.md").read_text(encoding="utf-8"),
    flags=re.DOTALL,
)


@pytest.mark.parametrize("place", range(3))
def test_the_readme_s_tables_are_those_of_the_committed_runs(
    place: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(COMMANDS) == 3
    arguments, table = COMMANDS[place]
    main(arguments.split())
    assert len(table.splitlines()) > 10
    assert max(map(len, table.splitlines())) <= 100
    assert capsys.readouterr().out.lstrip().startswith(table)
