"""Rules, runs, the table, the verdict, the whole command and its README."""

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.common.table import lay_out
from benchmarks.mtl import __main__ as command
from benchmarks.mtl.__main__ import SEEDS, main
from benchmarks.mtl.problem import Metric, Problem, Training, generator
from benchmarks.mtl.problems import (
    PROBLEMS,
    cells,
    detection,
    multimnist,
    pinn,
    retrieval,
    shapes,
)
from benchmarks.mtl.rules import RULES, rules_for, torchjd_weighting
from benchmarks.mtl.table import NOTES, compare, format_problem, verdict
from benchmarks.mtl.train import (
    Conflict,
    Result,
    conflict,
    digest,
    harmonized,
    plain_step,
    run,
    time_ratio,
)
from ghopt import Recorder, Recording, gh
from ghopt.measuring import Harmonization
from tests.benchmarks.test_mtl_problems import use_small_digits

SMALL = PROBLEMS["adversarial-small"]
README = Path(command.__file__).with_name("README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def small_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_digits(monkeypatch)


@pytest.fixture
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shapes, "COUNT", 400)
    monkeypatch.setattr(detection, "TESTS", 20)
    monkeypatch.setattr(retrieval, "TESTS", 60)
    cached = (shapes.shapes, detection.load, retrieval.load)
    for one in cached:
        one.cache_clear()
    yield
    for one in cached:
        one.cache_clear()


def random_gramian(tasks: int, seed: int) -> torch.Tensor:
    jacobian = torch.randn(tasks, 6, generator=generator(seed), dtype=torch.float64)
    return jacobian @ jacobian.T


# Rules


def test_every_rule_has_the_scale_of_a_sum() -> None:
    agreeing = torch.tensor(
        [[4.0, 1.0, 1.0], [1.0, 4.0, 1.0], [1.0, 1.0, 4.0]]
    ).double()
    for name, rule in RULES.items():
        tasks = min(rule.most, 3)
        weights = rule.make()(agreeing[:tasks, :tasks])
        assert weights.tolist() == pytest.approx([1] * tasks, abs=1e-3), name


def test_weights_of_mgda_are_of_the_shortest_combination_and_sum_to_their_number() -> (
    None
):
    weights = RULES["mgda"].make()(torch.tensor([[1.0, 0.0], [0.0, 3.0]]).double())
    assert weights.tolist() == pytest.approx([1.5, 0.5], abs=1e-2)


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_upgrad_is_gh_but_for_what_torchjd_adds_to_the_diagonal(tasks: int) -> None:
    from torchjd.aggregation import UPGradWeighting
    from torchjd.linalg import QuadprogProjector

    exact = UPGradWeighting(projector=QuadprogProjector(norm_eps=0, reg_eps=1e-13))
    for seed in range(10):
        gramian = random_gramian(tasks, seed)
        torch.testing.assert_close(
            exact(gramian) * tasks, gh(gramian), rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(
            RULES["upgrad"].make()(gramian), gh(gramian), rtol=0.05, atol=0.05
        )


def test_pcgrad_depends_on_the_order_that_it_draws_and_gh_on_none() -> None:
    gramian = random_gramian(5, seed=3)
    pcgrad = RULES["pcgrad"].make()
    torch.manual_seed(0)
    drawn = torch.stack([pcgrad(gramian) for _ in range(5)])
    assert float((drawn - drawn[0]).abs().max()) > 0.01
    order = torch.tensor([3, 1, 4, 0, 2])
    turned = gh(gramian[order][:, order])
    torch.testing.assert_close(turned, gh(gramian)[order])


def test_rules_are_run_for_the_numbers_of_tasks_that_they_are_for_the_sum_first() -> (
    None
):
    pair, three, eight = (PROBLEMS[name] for name in ("poisson", "heat", "cells"))
    several = ["ghpp", "upgrad", "mgda"]
    assert rules_for(pair, [*RULES]) == [
        "sum",
        "gh",
        "gh_projected",
        "ghpp",
        "ghpp_balanced",
        *several[1:],
    ]
    expected = ["sum", "gh", "gh_projected", *several, "pcgrad"]
    assert rules_for(three, [*RULES]) == expected
    assert rules_for(three, ["ghpp_balanced", "gh"]) == ["sum", "gh"]
    # It has a main task, which alone can be protected.
    assert rules_for(eight, [*RULES]) == [*expected[:3], "gh_protect", *expected[3:]]


def test_a_missing_peer_is_named_with_the_extra_that_has_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ImportError, match=re.escape('pip install "ghopt[mtl]"')):
        torchjd_weighting("MGDA", is_mean=True)
    with pytest.raises(SystemExit):
        main(["--problems", "heat"])
    said = capsys.readouterr()
    assert 'torchjd is missing; install it with: pip install "ghopt[mtl]"' in said.err
    assert "seed 0" not in said.err  # before any training
    main(["--problems", "poisson", "--rules", "gh", "--steps", "1", "--seeds", "1"])


# Runs


def recorded(gramians: Tensor, weights: Tensor) -> Recording:
    recorder = Recorder()
    names = ("a", "b", "c")[: len(gramians[0])]
    for products, tau in zip(gramians, weights, strict=True):
        recorder.record(Harmonization(names, products, tau))
    return recorder.flush()


def test_conflict_is_what_one_counts_by_hand() -> None:
    gramians = torch.tensor(
        [
            [[1.0, -2, 0], [-2, 5, 0], [0, 0, 0]],  # cosine -2 / sqrt(5); task 3 still
            [[1.0, 0.5, -0.5], [0.5, 1, 0], [-0.5, 0, 1]],
        ]
    ).double()
    found = conflict(recorded(gramians, torch.ones(2, 3).double()))
    assert found.obtuse == pytest.approx(100 * 2 / 6)
    assert found.cosine == pytest.approx(-2 / math.sqrt(5) / 6)
    assert found.opposed == pytest.approx(100 / 6)  # 1 - 2 < 0, and no other
    harmonized = torch.stack([gh(gramian) for gramian in gramians])
    assert conflict(recorded(gramians, harmonized)).opposed == 0
    assert conflict(recorded(gramians, torch.zeros(2, 3).double())).opposed == 0
    pair = torch.tensor([[[1.0, -2], [-2, 5]]]).double()
    assert conflict(recorded(pair, torch.tensor([[1, 0.1]]).double())).opposed == 50


def test_agreeing_tasks_end_bit_for_bit_at_the_sum() -> None:
    results = {rule: run(SMALL, rule, 0, 4) for rule in rules_for(SMALL, [*RULES])}
    plain = results["sum"]
    assert plain.conflict.obtuse == 0
    for rule in ("gh", "ghpp", "ghpp_balanced"):
        assert results[rule].parameters == plain.parameters
        assert results[rule].metrics == plain.metrics
    assert results["mgda"].parameters != plain.parameters


def test_tasks_in_conflict_end_elsewhere() -> None:
    problem = PROBLEMS["heat"]
    results = {rule: run(problem, rule, 0, 4) for rule in rules_for(problem, [*RULES])}
    assert results["sum"].conflict.obtuse > 0
    ends = {result.parameters for result in results.values()}
    assert len(ends) == len(results)


def test_rules_of_a_seed_meet_the_same_first_gradients_and_gh_opposes_none() -> None:
    for problem in (PROBLEMS["poisson"], PROBLEMS["cells"]):
        rules = rules_for(problem, [*RULES])
        first = [run(problem, rule, 1, 1).conflict for rule in rules]
        assert len({(one.obtuse, one.cosine) for one in first}) == 1
    sums, harmonized = (run(PROBLEMS["cells"], rule, 0, 30) for rule in ("sum", "gh"))
    assert sums.conflict.opposed > 0
    assert harmonized.conflict.opposed == 0


def test_steps_of_adam_oppose_tasks_that_the_gradient_does_not() -> None:
    rules = ("gh", "gh_projected")
    free, projected = (run(PROBLEMS["heat"], rule, 0, 60).conflict for rule in rules)
    assert free.opposed == projected.opposed == 0
    assert free.set_back > 5
    # As the rate falls to 0 the rounding of the parameters is no less than the step.
    assert projected.set_back < 2


def test_a_run_can_be_repeated_bit_for_bit() -> None:
    for rule in ("gh", "pcgrad"):
        one, two = (run(PROBLEMS["cells"], rule, 3, 5) for _ in range(2))
        assert one == two
    assert run(PROBLEMS["cells"], "gh", 4, 5).parameters != one.parameters


def test_the_sum_of_the_wrapper_trains_like_the_plain_sum() -> None:
    for problem in (multimnist.PROBLEM, cells.PROBLEM, pinn.PROBLEMS[1]):
        plain, wrapped = problem.start(0), problem.start(0)
        step, optimizer = plain_step(plain), harmonized(problem, wrapped, "sum")
        for _ in range(3):
            step(next(plain.batches))
            optimizer.zero_grad()
            optimizer.backward(wrapped.losses(next(wrapped.batches)))
            optimizer.step()
        pairs = zip(plain.model.parameters(), wrapped.model.parameters(), strict=True)
        for one, two in pairs:
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_the_learning_rate_falls_to_zero_by_the_last_step() -> None:
    kept: list[Training] = []

    def start(seed: int) -> Training:
        kept.append(pinn.start_poisson(seed))
        rates.append(kept[-1].optimizer.param_groups[0]["lr"])
        kept[-1].optimizer.register_step_post_hook(
            lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
        )
        return kept[-1]

    rates: list[float] = []
    run(replace(pinn.PROBLEMS[0], start=start), "gh", 0, 4)
    assert rates == pytest.approx(
        [pinn.RATE * share for share in (1, 1, 0.75, 0.5, 0.25)]
    )
    assert kept[0].optimizer.param_groups[0]["lr"] == 0


def test_a_digest_sees_the_last_bit_of_one_parameter() -> None:
    model = torch.nn.Linear(3, 2)
    before = digest(model)
    assert digest(model) == before
    with torch.no_grad():
        model.bias[1] = torch.nextafter(model.bias[1], torch.tensor(9.0))
    assert digest(model) != before


def test_a_time_ratio_is_taken_on_the_same_batches() -> None:
    seen: list[tuple[int, float]] = []

    def start(seed: int) -> Training:
        training = pinn.start_poisson(seed)

        def losses(batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
            seen.append((id(training.model), float(batch[0][0])))
            return training.losses(batch)

        return training._replace(losses=losses)

    assert time_ratio(replace(pinn.PROBLEMS[0], start=start), "gh", rounds=1) > 0
    assert len({model for model, _ in seen}) == 2
    values = [value for _, value in seen]
    assert values[::2] == values[1::2]  # both, one after the other
    models = [model for model, _ in seen]
    assert models[0] == models[3] != models[1]  # A B, then B A


# The table

PROBLEM = Problem(
    "toy",
    "a toy",
    ("a", "b"),
    (
        Metric("score"),
        Metric("error %", ".2f", more_is_better=False),
        Metric("part", headline=False),
    ),
    7,
    pinn.start_poisson,
)


def result(rule: str, seed: int, score: float, error: float) -> Result:
    metrics = {"score": score, "error %": error, "part": score / 2}
    found = Conflict(obtuse=20.0 * seed, cosine=-0.25, opposed=1.5, set_back=9.25)
    # Seed 0 ends where the sum does.
    end = f"{seed}" if seed == 0 else f"{rule}{seed}"
    return Result("toy", rule, seed, 7, metrics, found, end)


def toy_results() -> list[Result]:
    """The sum's seeds in reverse: pairs must not go by order."""
    plain = [result("sum", seed, 50.0 + 10 * seed, 3.0) for seed in (2, 1, 0)]
    rule = [result("gh", seed, 51.0 + 11 * seed, 4.0 + seed / 10) for seed in range(3)]
    return plain + rule


def test_the_table_has_a_line_per_rule_with_paired_differences() -> None:
    lines = format_problem(PROBLEM, toy_results(), {"gh": 1.234}).splitlines()
    assert lines[0] == "toy: a toy"
    assert lines[1] == "2 tasks (a, b); 3 seeds, 7 steps"
    expected = "score minus sum error % minus sum obtuse % cosine opposed % by step % same bits time"
    assert lines[3].split() == f"rule {expected}".split()
    plain = "sum 60.0 +- 10.0 - 3.00 +- 0.00 - 20.0 -0.250 1.5 9.2 - 1"
    assert lines[5].split() == plain.split()
    rule = "gh 62.0 +- 11.0 +2.0 +- 0.6 4.10 +- 0.10 +1.10 +- 0.06 20.0 -0.250 1.5 9.2 1/3 1.23"
    assert lines[6].split() == rule.split()
    assert [line.split() for line in lines[8:]] == [
        ["metric", "sum", "gh"],
        ["-" * len(lines[8])],
        ["part", "30.0", "31.0"],
    ]


def test_one_seed_has_no_spread() -> None:
    one = [found for found in toy_results() if found.seed == 0]
    line = format_problem(PROBLEM, one, {"gh": 1.0}).splitlines()[6]
    assert line.split() == [
        "gh",
        "51.0",
        "+1.0",
        "4.00",
        "+1.00",
        "0.0",
        "-0.250",
        "1.5",
        "9.2",
        "1/1",
        "1.00",
    ]


def test_columns_are_aligned_under_their_titles() -> None:
    text = lay_out([["rule", "x"], ["a", "1.50"], ["longer", "2"]])
    assert text == "rule       x\n------------\na       1.50\nlonger     2"


def test_the_verdict_tells_gains_and_losses_from_noise_and_knows_their_sign() -> None:
    compared = compare(PROBLEM, toy_results())
    text = verdict(compared, seeds=3)
    assert "1 of 2 differences" in text
    assert "chance alone would put 0.1 beyond" in text
    assert "Better than the sum: none." in text
    assert "Worse than the sum:\n  toy, gh: error % +1.10 (margin 0.25)" in text
    better = replace(PROBLEM, metrics=(Metric("error %", ".2f"),))
    text = verdict(compare(better, toy_results()), seeds=3)
    assert "Better than the sum:\n  toy, gh: error % +1.10" in text
    assert "Worse than the sum: none." in text


def test_two_seeds_or_the_sum_alone_show_nothing() -> None:
    compared = compare(PROBLEM, toy_results())
    assert "Below 3 seeds" in verdict(compared, seeds=2)
    plain = [found for found in toy_results() if found.rule == "sum"]
    assert "nothing to compare" in verdict(compare(PROBLEM, plain), seeds=3)


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problems", "nope"], "--problems: invalid choice: 'nope'"),
        (["--rules", "nope"], "--rules: invalid choice: 'nope'"),
        (["--seeds", "0"], "--seeds: invalid value: 0"),
        (["--steps", "-1"], "--steps: invalid value: -1"),
        (["--json", "nowhere/all.json"], "--json: nowhere is no folder"),
    ],
)
def test_the_command_names_what_is_wrong(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--quick"])
    said = capsys.readouterr().err
    assert message in said
    assert "seed 0" not in said


@pytest.mark.slow
@pytest.mark.usefixtures("few_shapes")
def test_the_command_prints_every_table_and_writes_every_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.mtl.__main__.time_ratio", lambda *_: 1.5)
    path = tmp_path / "all.json"
    main(["--quick", "--steps", "2", "--json", str(path)])
    out = capsys.readouterr().out
    assert re.search(r"^\d+\.\d minutes of CPU time$", out, re.MULTILINE)
    assert NOTES in out
    assert re.match(
        r"date \d{4}-\d\d-\d\d, device .*, threads 1, python .*torch .*", out
    )
    for problem in PROBLEMS.values():
        assert f"\n{problem.name}: {problem.title}\n" in out
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["time"].keys() == PROBLEMS.keys()
    assert {(one["seed"], one["steps"]) for one in written["results"]} == {(0, 2)}
    ran = {(one["problem"], one["rule"]) for one in written["results"]}
    assert ran == {
        (problem.name, rule)
        for problem in PROBLEMS.values()
        for rule in rules_for(problem, [*RULES])
    }


def test_the_readme_has_what_the_command_prints() -> None:
    assert NOTES in README
    for problem in PROBLEMS.values():
        names = ", ".join(problem.tasks)
        title = (
            f"{problem.name}: {problem.title}\n{len(problem.tasks)} tasks ({names}); "
            f"{SEEDS} seeds, {problem.steps} steps\n\n"
        )
        assert title in README
        header, _, *rows = README.split(title)[1].split("\n\n")[0].splitlines()
        titles = [metric.name for metric in problem.metrics if metric.headline]
        columns = " minus sum ".join(["rule " + titles[0], *titles[1:]])
        expected = (
            f"{columns} minus sum obtuse % cosine opposed % by step % same bits time"
        )
        assert header.split() == expected.split()
        rules = rules_for(problem, [*RULES])
        assert [row.split()[0] for row in rows] == rules
        for metric in problem.metrics:
            assert metric.headline or f"\n{metric.name} " in README


def test_the_readme_names_every_option() -> None:
    for option in ("--quick", "--problems", "--rules", "--seeds", "--steps", "--json"):
        assert option in README
