"""Rules at their best cell: what a contender is, what is chosen, and what is printed."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from benchmarks.common.store import append_run, read_runs
from benchmarks.mtl import tuned as command
from benchmarks.mtl.problems import PROBLEMS
from benchmarks.mtl.tuned import fill, format_problem
from benchmarks.mtl.tuning import (
    CHOOSING,
    COMPARING,
    CONTENDERS,
    STORE,
    Cell,
    Order,
    Run,
    best_cell,
    train,
    values,
    weighted,
)

CELL = Cell(2.0, 4.0)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("poisson", "heat"):
        monkeypatch.setitem(PROBLEMS, name, replace(PROBLEMS[name], steps=4))


def literal_error(rate: float, weight: float, steps: int, betas: float = 0.9) -> float:
    """Train the heat equation on the plain sum, as one would write it."""
    training = PROBLEMS["heat"].start(3)
    lr = training.optimizer.param_groups[0]["lr"]
    base = torch.optim.Adam(
        training.model.parameters(), lr=rate * lr, betas=(betas, 0.999)
    )
    for step, batch in enumerate(islice(training.batches, steps)):
        for group in base.param_groups:
            group["lr"] = rate * lr * (1 - step / steps)
        base.zero_grad()
        losses = training.losses(batch)
        total = losses["residual"] + weight * (losses["boundary"] + losses["initial"])
        torch.autograd.backward(total)
        base.step()
    return training.evaluate()["rel. L2 error %"]


@pytest.mark.parametrize(
    ("contender", "steps", "beta"),
    [
        ("sum", 4, 0.9),
        ("sum, K times the steps", 12, 0.9),
        ("sum, without momentum", 4, 0.0),
    ],
)
@pytest.mark.usefixtures("short")
def test_a_control_is_the_plain_sum_as_one_writes_it(
    contender: str, steps: int, beta: float
) -> None:
    run = train(Order("heat", contender, CELL, 3))
    assert run.steps == steps
    expected = literal_error(*CELL, steps, beta)
    assert run.metrics["rel. L2 error %"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("short")
def test_contenders_differ_and_a_run_can_be_repeated() -> None:
    errors = {
        name: train(Order("heat", name, CELL, 3)).metrics["rel. L2 error %"]
        for name in CONTENDERS
    }
    assert len(set(errors.values())) == len(errors)
    assert train(Order("heat", "gh, projected", CELL, 3)).metrics == {
        "rel. L2 error %": errors["gh, projected"]
    }


def test_only_the_losses_that_a_problem_names_are_weighted() -> None:
    losses = {name: torch.tensor(1.0) for name in PROBLEMS["heat"].tasks}
    found = weighted(PROBLEMS["heat"], losses, 10.0)
    assert {name: float(loss) for name, loss in found.items()} == {
        "residual": 1,
        "boundary": 10,
        "initial": 10,
    }


def made(order: Order, value: float) -> Run:
    metric = PROBLEMS[order.problem].metrics[0].name
    return Run(
        order.key,
        order.problem,
        order.contender,
        *order.cell,
        order.seed,
        order.steps,
        {metric: value},
        "torch",
    )


def known_of(
    problem: str, values_of: dict[tuple[str, Cell, int], float]
) -> dict[str, Run]:
    orders = {Order(problem, *of): value for of, value in values_of.items()}
    return {order.key: made(order, value) for order, value in orders.items()}


@pytest.mark.parametrize(
    ("problem", "best"), [("heat", Cell(1, 1)), ("detection-plain", Cell(4, 1))]
)
def test_the_best_cell_has_the_best_mean_in_the_sense_of_the_metric(
    problem: str, best: Cell
) -> None:
    cells = [Cell(1, 1), Cell(4, 1)]
    known = known_of(
        problem,
        {
            ("gh", cells[0], 0): 1.0,
            ("gh", cells[0], 1): 2.0,
            ("gh", cells[1], 0): 0.5,
            ("gh", cells[1], 1): 9.0,
        },
    )
    assert best_cell(known, problem, "gh", cells, range(2)) == best
    assert values(known, problem, "gh", cells[1], range(2)) == [0.5, 9.0]
    # Not before all cells have all seeds.
    assert best_cell(known, problem, "gh", cells, range(3)) is None
    assert best_cell(known, problem, "sum", cells, range(2)) is None


def test_seeds_that_choose_do_not_compare() -> None:
    assert not set(CHOOSING) & set(COMPARING)
    assert len(COMPARING) >= 10


def test_keys_tell_runs_apart_and_whole_numbers_are_as_good_as_others() -> None:
    order = Order("heat", "gh", Cell(1.0, 4.0), 2)
    others = [
        order._replace(problem="poisson"),
        order._replace(contender="sum"),
        order._replace(cell=Cell(2.0, 4.0)),
        order._replace(cell=Cell(1.0, 1.0)),
        order._replace(seed=3),
    ]
    assert len({order.key, *(one.key for one in others)}) == 6
    assert order._replace(cell=Cell(1, 4)).key == order.key


@pytest.mark.slow
def test_a_run_that_is_there_is_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "runs.jsonl"
    orders = [Order("poisson", name, CELL, 3) for name in ("gh", "sum")]
    append_run(store, made(orders[0], 7.0))
    fill(store, orders, workers=1)
    assert "1/1 poisson sum seed 3" in capsys.readouterr().err
    runs = read_runs(store, Run)
    assert {run.contender for run in runs.values()} == {"sum", "gh"}
    assert runs[orders[0].key].metrics == {"rel. L2 error %": 7.0}
    fill(store, orders, workers=1)
    assert not capsys.readouterr().err  # nothing to do


def test_the_comparison_is_paired_with_the_sum_and_with_the_control() -> None:
    cell = Cell(1, 1)
    figures = {"sum": 5.0, "sum, projected on itself": 4.0, "gh, projected": 2.0}
    spread = dict(enumerate([*CHOOSING, *COMPARING]))
    known = known_of(
        "heat",
        {
            (name, cell, seed): value + 0.1 * place
            for name, value in figures.items()
            for place, seed in spread.items()
        },
    )
    lines = format_problem(known, "heat", [cell]).splitlines()
    grid, row = [line for line in lines if line.startswith("gh, projected ")]
    assert "-3.00 +- 0.00" in row
    assert "-2.00 +- 0.00" in row
    assert row.split()[-1] == "3"
    assert grid.split()[-1] == "2.15"


def test_the_command_shows_what_the_store_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(["--show", "--problems", "heat", "--store", str(tmp_path / "none")])
    assert "heat: heat equation" in capsys.readouterr().out


def test_the_stored_runs_are_those_that_the_command_would_train() -> None:
    runs = read_runs(STORE, Run)
    assert runs
    for run in runs.values():
        cell = Cell(run.rate, run.weight)
        order = Order(run.problem, run.contender, cell, run.seed)
        assert (order.key, order.steps) == (run.key, run.steps)


@pytest.mark.parametrize(
    ("problem", "rates", "weights"),
    [
        ("poisson", (1, 4), (1, 10)),
        ("heat", (1, 4), (1, 10)),
        ("helmholtz", (1, 4), (1, 10)),
        ("detection-plain", (0.5, 1, 2, 4), (1, 4, 10)),
    ],
)
def test_the_page_has_what_the_command_shows_of_the_stored_runs(
    problem: str, rates: tuple[float, ...], weights: tuple[int, ...]
) -> None:
    page = Path(command.__file__).with_name("README.md").read_text(encoding="utf-8")
    cells = [Cell(rate, weight) for rate in rates for weight in weights]
    assert format_problem(read_runs(STORE, Run), problem, cells) in page
