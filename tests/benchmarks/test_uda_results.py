"""What comes out: records, statistics, the table, the verdict, the whole command."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

import ghopt
from benchmarks.common.clock import WARM_UPS
from benchmarks.common.store import append_run, read_runs
from benchmarks.uda import __main__ as job
from benchmarks.uda import plots, timing
from benchmarks.uda.__main__ import main, make_configs
from benchmarks.uda.data import Task, batches
from benchmarks.uda.methods import Losses, dann_losses
from benchmarks.uda.methods.gramians import Row, cosines, norm_ratios, obtuse_share
from benchmarks.uda.methods.networks import Networks, build_networks
from benchmarks.uda.methods.rules import RULES, find_rule
from benchmarks.uda.methods.steps import ALL_METHODS, METHODS, Config, Step
from benchmarks.uda.methods.updates import MakeUpdate, Update, plain_update
from benchmarks.uda.runs import cost, train
from benchmarks.uda.runs.cost import time_ratios
from benchmarks.uda.runs.records import Result, key_of
from benchmarks.uda.runs.train import run
from benchmarks.uda.runs.train import test_error as error_on
from benchmarks.uda.views.plots import draw_all
from benchmarks.uda.views.table import COLUMNS, format_table, verdict
from tests.benchmarks.modules import same, values


def result(method: str, rule: str, seed: int, accuracy: float) -> Result:
    before: list[Row] = [(4.0, -1.0, 1.0), (4.0, 1.0, 16.0)]
    return Result(
        config={"task": "a-b", "method": method, "rule": rule, "seed": seed},
        errors=[(0, 90.0), (10, 100 - accuracy)],
        before=[] if method == "source-only" else before,
        after=[] if method == "source-only" else [(4.0, 1.0, 1.0)] * 2,
        null=before if rule == "sum" else [],
    )


def results(**accuracies: list[float]) -> list[Result]:
    """Runs of DANN, by rule; the sum's seeds in reverse: pairs must not go by order."""
    return [
        result("DANN", rule, seed, accuracy)
        for rule, by_seed in accuracies.items()
        for seed, accuracy in sorted(enumerate(by_seed), reverse=rule == "sum")
    ]


def keep(folder: Path, runs: Iterable[Result]) -> Path:
    path = folder / "results.jsonl"
    for one in runs:
        append_run(path, one)
    return path


def test_the_verdict_says_when_no_rule_helps() -> None:
    text = verdict(
        results(sum=[50.0, 51.0, 52.0], gh=[52.0, 50.0, 53.0], ghpp=[50.0, 50.0, 50.0])
    )
    assert "2 of 2 differences" in text
    assert "No rule is shown to help on this data." in text
    assert "Beyond noise" not in text


def test_the_verdict_names_gains_and_losses_beyond_noise() -> None:
    runs = results(
        sum=[50.0, 51.0, 52.0], gh=[55.0, 56.1, 56.9], ghpp=[45.0, 46.1, 46.9]
    )
    text = verdict(runs)
    assert "0 of 2 differences" in text
    assert "DANN gh +5.0, DANN ghpp -5.0" in text
    assert "2 comparisons chance alone lets 0.1 through" in text
    assert "No rule" not in text


def test_a_loss_beyond_noise_is_no_help() -> None:
    text = verdict(results(sum=[50.0, 51.0, 52.0], gh=[45.0, 46.1, 46.9]))
    assert "DANN gh -5.0" in text
    assert "No rule is shown to help on this data." in text


def test_one_seed_shows_nothing() -> None:
    text = verdict(results(sum=[50.0], gh=[90.0]))
    assert "No rule is shown to help on this data." in text


def test_the_table_has_all_columns_and_the_last_step_not_the_best() -> None:
    runs = results(sum=[50.0, 52.0, 54.0], gh=[51.0, 54.0, 57.0])
    runs[0] = Result(**{**vars(runs[0]), "errors": [(0, 90.0), (5, 1.0), (10, 46.0)]})
    runs.append(result("source-only", "sum", 0, 40.0))
    lines = format_table(runs, {"DANN": {"gh": 1.5}}).splitlines()
    assert all(column in lines[0] for column in COLUMNS)
    assert lines[2].split() == [
        "DANN",
        "sum",
        "52.0",
        "+-",
        "2.0",
        "-",
        "50",
        "-0.188",
        "1.250",
        "1",
    ]
    assert lines[3].split() == (
        [
            "DANN",
            "gh",
            "54.0",
            "+-",
            "3.0",
            "+2.0",
            "+-",
            "0.6",
            "50",
            "-0.188",
            "1.250",
            "1.50",
        ]
    )
    assert lines[4].split() == ["source-only", "-", "40.0", "-", "-", "-", "-", "-"]


def test_cosines_and_ratios_are_those_of_the_gradients() -> None:
    rows: list[Row] = [(4.0, -1.0, 1.0), (0.0, 0.0, 9.0), (9.0, -1e-12, 1.0)]
    assert cosines(rows).tolist() == pytest.approx([-0.5, 0, 0])
    assert norm_ratios(rows).tolist() == [2, 0, 3]
    assert obtuse_share(rows) == pytest.approx(1 / 3)
    assert math.isnan(obtuse_share([]))
    assert math.isnan(obtuse_share([*rows, (math.nan, math.nan, math.nan)]))


def test_results_survive_the_file(tmp_path: Path) -> None:
    path = keep(tmp_path, results(sum=[50.0, 51.0], gh=[52.0, 53.0]))
    again = read_runs(path, Result)
    for one in results(sum=[50.0, 51.0], gh=[52.0, 53.0]):
        assert again[one.key].config == one.config
        assert again[one.key].accuracy == one.accuracy
        assert cosines(again[one.key].before).equal(cosines(one.before))
    assert len(again) == 4


def test_a_line_of_old_has_the_key_of_its_settings(tmp_path: Path) -> None:
    config = Config("a-b", "DANN", "gh", seed=1, steps=3)
    path = keep(tmp_path, [Result(config.settings(), [(3, 40.0)], [], [], [])])
    line = json.loads(path.read_text(encoding="utf-8"))
    for name in ("key", "torch", "balance", "confusion", "points"):
        del line[name]
    path.write_text(f"{json.dumps(line)}\n", encoding="utf-8")
    assert read_runs(path, Result).keys() == {key_of(config)}


def test_plots_are_drawn_from_stored_results_even_of_a_diverged_run(
    tmp_path: Path,
) -> None:
    runs = results(**{rule: [50.0, 51.0] for rule in RULES})
    runs[0].before.append((math.nan, math.nan, math.nan))
    kept = read_runs(keep(tmp_path, runs), Result)
    for path in draw_all([*kept.values()], tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_plots_command_draws_what_a_folder_holds(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawn: list[list[Result]] = []
    monkeypatch.setattr(plots, "draw_all", lambda runs, _: drawn.append(runs))
    for arguments, message in (
        ([], "required: folder"),
        ([str(tmp_path)], "No such file"),
    ):
        with pytest.raises(SystemExit):
            plots.main(arguments)
        assert message in capsys.readouterr().err
    path = tmp_path / "results.jsonl"
    for text, message in (("", "has no run"), ("{\n", "line 1"), ("{}\n", "line 1")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit):
            plots.main([str(tmp_path)])
        assert message in capsys.readouterr().err
    path.unlink()
    runs = results(**{rule: [50.0, 51.0] for rule in RULES})
    longer = [replace(one, config={**one.config, "steps": 9}, key="") for one in runs]
    for one in [*longer, *runs[:-1]]:
        append_run(path, one)
    # A job of other steps is another; this one was killed before its last run.
    with pytest.raises(SystemExit):
        plots.main([str(tmp_path)])
    assert "lacks some: python -m benchmarks.uda" in capsys.readouterr().err
    append_run(path, runs[-1])
    plots.main([str(tmp_path)])
    ((*found,),) = drawn
    assert [one.key for one in found] == [one.key for one in runs]


def config(task: Task, method: str, rule: str) -> Config:
    return Config(task.name, method, rule, seed=1, steps=6, batch_size=8)


def test_rules_of_a_seed_start_alike_and_meet_the_same_first_gradients(
    task: Task,
) -> None:
    for method in METHODS[1:]:
        runs = [run(config(task, method, rule), task) for rule in RULES]
        assert len({one.errors[0] for one in runs}) == 1
        assert len({one.before[0] for one in runs}) == 1
        assert (
            len(
                {
                    one.accuracy
                    for one in [runs[0], run(config(task, method, "sum"), task)]
                }
            )
            == 1
        )


def test_stored_gramians_are_what_each_rule_promises(task: Task) -> None:
    for method in METHODS[1:]:
        for rule in RULES:
            one = run(config(task, method, rule), task)
            before, after = cosines(one.before), cosines(one.after)
            conflict = before < -1e-9
            assert len(before) == 6
            assert torch.allclose(after[~conflict], before[~conflict])
            if rule == "gh":
                assert (after >= -1e-9).all()
            elif rule == "ghpp":
                assert (after[conflict].abs() < 1e-7).all()
            else:
                assert torch.allclose(after, before, atol=1e-6)


def test_the_reversal_starts_at_zero_so_the_first_alignment_gradient_is_zero(
    task: Task,
) -> None:
    squared_norms = [row[0] for row in run(config(task, "DANN", "gh"), task).before]
    assert squared_norms[0] == 0
    assert all(squared_norm > 0 for squared_norm in squared_norms[1:])


def test_evaluation_drops_no_unit_and_leaves_training_as_it_was(task: Task) -> None:
    networks = build_networks("DANN", seed=0)
    state = torch.get_rng_state()
    error = error_on(networks, task.test)
    assert torch.get_rng_state().equal(state)
    assert networks.training
    predicted = networks.eval()(task.test.images).argmax(1)
    assert error == pytest.approx(
        100 * (predicted != task.test.labels).sum().item() / 32
    )


def test_only_runs_of_the_sum_look_at_unrelated_gradients(task: Task) -> None:
    assert run(config(task, "DANN", "sum"), task).null
    assert not run(config(task, "DANN", "gh"), task).null
    assert not run(config(task, "source-only", "sum"), task).before


def test_a_run_computes_where_its_task_is(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.device] = []

    def make(_config: Config, networks: Networks, *_: object) -> Step:
        seen.extend(parameter.device for parameter in networks.parameters())
        return lambda batch, _: seen.extend(part.device for part in batch)

    monkeypatch.setattr(train, "make_step", make)
    monkeypatch.setattr(train, "test_error", lambda *_: 50.0)
    run(config(task, "DANN", "sum"), task.to(torch.device("meta")))
    assert len(seen) > 20
    assert set(seen) == {torch.device("meta")}


def test_the_last_evaluation_is_after_the_last_step(task: Task) -> None:
    one = run(Config(task.name, "source-only", "sum", 0, steps=7, batch_size=8), task)
    assert [step for step, _ in one.errors] == [0, 1, 2, 3, 4, 5, 6, 7]
    many = Config(task.name, "source-only", "sum", 0, steps=25, batch_size=8)
    assert run(many, task).errors[-1][0] == 25


def test_times_are_medians_and_relative_to_the_plain_step_of_the_round(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only counts updates: 1 for the plain one, 3 and 10 for others.

    In the last round the machine is five times as slow.
    """
    now = 0.0
    rounds = 4

    def slow(cost: float) -> MakeUpdate:
        def make(sgd: SGD, shared: Iterable[nn.Parameter]) -> Update:
            del sgd, shared
            done = 0

            def update(losses: Losses) -> None:
                nonlocal now, done
                del losses
                done += 1
                warm = done > WARM_UPS
                last = done == WARM_UPS + rounds
                now += (cost if warm else 7 / cost) * (5 if last else 1)

            return update

        return make

    monkeypatch.setattr(cost, "plain_update", slow(1))
    monkeypatch.setattr("time.process_time", lambda: now)
    updates = {"three": slow(3), "ten": slow(10)}
    plain, ratios = time_ratios(task, "DANN", updates, rounds)
    assert plain == pytest.approx(1000)
    assert ratios == pytest.approx({"three": 3, "ten": 10})


def test_a_timed_update_trains_networks_of_its_own_on_the_same_batches(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Dropout, "forward", lambda _, inputs: inputs)
    seen: list[list[float]] = []

    def watch(sgd: SGD, shared: Iterable[nn.Parameter]) -> Update:
        values: list[float] = []
        seen.append(values)
        step = plain_update(sgd, shared)

        def update(losses: Losses) -> None:
            values.append(losses.classification.item())
            step(losses)

        return update

    time_ratios(task, "GVB", {"a": watch, "b": watch}, rounds=2)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == WARM_UPS + 2


def test_what_a_step_costs_is_printed_for_each_method(
    monkeypatch: pytest.MonkeyPatch, task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "load_task", lambda *_, **__: task)
    timing.main(["--rounds", "1"])
    head, _, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert head.split() == ["method", "plain,", "ms", "gh", "ghpp", "three", "passes"]
    assert [row.split()[0] for row in rows] == list(ALL_METHODS[1:])
    assert all(float(cell) > 0 for row in rows for cell in row.split()[1:])


def test_a_timed_rule_is_the_rule_of_its_name(task: Task) -> None:
    batch = next(batches(task, 8, 1, seed=0))
    trained = {}
    for rule, make_update in cost.updates_of("sum", "gh", "ghpp").items():
        networks = build_networks("DANN", seed=0).eval()
        losses = dann_losses(networks, batch, 1.0, 1.0)
        sgd = SGD(networks.parameters(), lr=0.1)
        update = make_update(sgd, networks.generator.parameters())
        update(Losses(losses.alignment - losses.classification, losses.classification))
        expected = build_networks("DANN", seed=0).eval()
        losses = dann_losses(expected, batch, 1.0, 1.0)
        optimizer = ghopt.HarmonizedOptimizer(
            SGD(expected.parameters(), lr=0.1),
            weighting=find_rule(rule).weighting,
            shared_params=list(expected.generator.parameters()),
        )
        optimizer.step(
            losses=[losses.alignment - losses.classification, losses.classification]
        )
        assert same(values(networks), values(expected))
        trained[rule] = values(networks)
    assert not same(trained["sum"], trained["gh"])
    assert not same(trained["gh"], trained["ghpp"])


def test_three_passes_weigh_the_losses_for_all_parameters(task: Task) -> None:
    batch = next(batches(task, 8, 1, seed=0))

    def opposed(networks: Networks) -> Losses:
        losses = dann_losses(networks, batch, 1.0, 1.0)
        return Losses(losses.alignment - losses.classification, losses.classification)

    expected, found = (build_networks("DANN", seed=0).eval() for _ in range(2))
    losses = opposed(expected)
    rows = []
    for loss in losses:
        expected.zero_grad()
        torch.autograd.backward(loss, retain_graph=True)
        grads = [p.grad for p in expected.generator.parameters() if p.grad is not None]
        rows.append(torch.cat([grad.flatten() for grad in grads]).double())
    a, d, b = rows[0] @ rows[0], rows[0] @ rows[1], rows[1] @ rows[1]
    assert d < 0  # or there is nothing to weigh
    expected.zero_grad()
    weighed = (1 - d / a) * losses.alignment + (1 - d / b) * losses.classification
    torch.autograd.backward(weighed)
    sgd = SGD(found.parameters(), lr=0.0)
    cost.three_passes(sgd, found.generator.parameters())(opposed(found))
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_every_method_but_source_only_runs_with_every_rule() -> None:
    configs = make_configs("t", seeds=2, steps=3)
    assert len(set(configs)) == len(configs) == 2 * (1 + 3 * 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds: invalid value: 0"),
        (["--steps", "-1"], "--steps: invalid value: -1"),
        (["--task", "svhn"], "--task: invalid choice: 'svhn'"),
        (["--task", "usps-mnist"], "needs --data DIR"),
        (["--data", "nowhere"], "nowhere/usps.npz is missing"),
    ],
)
def test_the_command_names_what_is_wrong(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_the_command_trains_what_its_store_lacks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: Task,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained: list[Config] = []
    data = [task]
    ratios = {name: dict.fromkeys(RULES, 1.0) for name in METHODS}

    def finished(
        given: Task, configs: Sequence[Config], train: object
    ) -> Iterator[Result]:
        assert train is run
        for config in configs:
            trained.append(config)
            yield run(config, given)

    monkeypatch.setattr(job, "load_task", lambda *_: data[-1])
    monkeypatch.setattr(job, "start_pool", nullcontext)
    monkeypatch.setattr(job, "timed", lambda *_: ratios)
    monkeypatch.setattr(job, "finished", finished)
    monkeypatch.setattr(job, "draw_all", lambda *_: [])
    asked = ["--steps", "2", "--out", str(tmp_path), "--seeds"]
    main([*asked, "1"])
    assert len(trained) == 13
    first = capsys.readouterr().out
    assert first.startswith("\nmnist5k-digits\n")
    store = tmp_path / "results.jsonl"
    store.write_text(
        store.read_text(encoding="utf-8")[:-9], encoding="utf-8"
    )  # killed while it wrote
    main([*asked, "1"])
    assert trained[13:] == trained[12:13]
    again = capsys.readouterr().out
    assert again == f"12 of 13 runs are in {store}\n{first}"
    main([*asked, "2"])
    assert {one.seed for one in trained[14:]} == {1}
    # The longest first.
    assert [one.method for one in trained[14:]] == (
        4 * ["MCD"] + 4 * ["CDAN+E"] + 4 * ["DANN"] + ["source-only"]
    )
    # Files that are not those of the README are other runs.
    data.append(replace(task, foreign=("1",)))
    main([*asked, "1"])
    assert len(trained) == 40


@pytest.mark.slow
def test_the_command_prints_every_column_and_writes_every_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--seeds", "1", "--steps", "3", "--out", str(tmp_path / "new")])
    out = capsys.readouterr().out
    assert all(column in out for column in COLUMNS)
    assert all(name in out for name in (*METHODS, *RULES))
    assert (
        "No rule is shown to help on this data.\nOn more data, and longer: DWL" in out
    )
    assert "python -m benchmarks.uda.verdict" in out
    written = {path.name for path in (tmp_path / "new").iterdir()}
    assert written == {
        "results.jsonl",
        "table.txt",
        "cosines.png",
        "inner-products.png",
        "test-error.png",
    }
    lines = (
        (tmp_path / "new" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    )
    configs = [json.loads(line)["config"] for line in lines]
    assert len(configs) == 13
    assert all(one["steps"] == 3 and one["trade_off"] == 1 for one in configs)
