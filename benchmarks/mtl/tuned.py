"""Compare rules at their best: each at the rate and the loss weight that suit it.

Trains what the store lacks, first the grid on some seeds, then each contender's best cell
on others, and prints both. Goes on where it stopped.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev

import torch

from benchmarks.common.options import add_runs
from benchmarks.common.statistics import paired_difference
from benchmarks.common.store import append_run, read_runs
from benchmarks.common.table import lay_out
from benchmarks.mtl.problems import PROBLEMS
from benchmarks.mtl.tuning import (
    CHOOSING,
    COMPARING,
    CONTENDERS,
    STORE,
    Cell,
    Order,
    Run,
    at_best,
    best_cell,
    train,
    values,
)

CONTROLS = ("sum", "sum, projected on itself", "sum, K times the steps")
"""With which every contender is compared."""

NOTES = f"""\
Rates are times the problem's, weights those of {{tasks}}.
best: the cell with the best mean over seeds {CHOOSING.start} to {CHOOSING.stop - 1}.
The figure is that of this cell over seeds {COMPARING.start} to {COMPARING.stop - 1}, mean +- standard deviation.
minus ...: paired by seed, mean +- its 95 % margin (Student's t); in the tables of
  python -m benchmarks.mtl it is a standard error.
projected on itself: momentum and step oppose the total gradient in nothing, a restart of
  momentum. projected: they oppose no task.
passes: backward passes of a training, in those of the sum."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = _parser().parse_args(arguments)
    cells = [Cell(rate, weight) for rate in options.rates for weight in options.weights]
    for problem in options.problems:
        if not options.show:
            grid = [
                Order(problem, name, cell, seed)
                for seed in CHOOSING
                for cell in cells
                for name in CONTENDERS
            ]
            fill(options.store, grid, options.workers)
            known = read_runs(options.store, Run)
            best = {
                name: best_cell(known, problem, name, cells, CHOOSING)
                for name in CONTENDERS
            }
            final = [
                Order(problem, name, cell, seed)
                for seed in COMPARING
                for name, cell in best.items()
                if cell
            ]
            fill(options.store, final, options.workers)
        print(format_problem(read_runs(options.store, Run), problem, cells), flush=True)


def fill(store: Path, orders: Iterable[Order], workers: int) -> None:
    """Train what the store lacks; keep each run as soon as it is done."""
    known = read_runs(store, Run)
    missing = [order for order in orders if order.key not in known]
    context = multiprocessing.get_context("spawn")  # a fork would copy threads half
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(train, order) for order in missing]
        for count, future in enumerate(as_completed(futures), start=1):
            run = future.result()
            append_run(store, run)
            print(
                f"{count}/{len(missing)} {run.problem} {run.contender} seed {run.seed}",
                file=sys.stderr,
                flush=True,
            )


def format_problem(
    known: Mapping[str, Run], problem: str, cells: Sequence[Cell]
) -> str:
    """Lay out the grid of a problem and, where there is one, the comparison."""
    chosen = PROBLEMS[problem]
    tasks = " and ".join(chosen.weighted)
    title = f"{problem}: {chosen.title}; {chosen.metrics[0].name}"
    return "\n\n".join(
        [
            title,
            _grid(known, problem, cells),
            _comparison(known, problem, cells),
            NOTES.format(tasks=tasks),
        ]
    )


def _grid(known: Mapping[str, Run], problem: str, cells: Sequence[Cell]) -> str:
    """Lay out the means over the seeds that choose, a column for each cell."""
    form = PROBLEMS[problem].metrics[0].form
    rows = [["rate x, weight", *(f"{rate:g}, {weight:g}" for rate, weight in cells)]]
    for name in CONTENDERS:
        found = [values(known, problem, name, cell, CHOOSING) for cell in cells]
        rows.append([name, *(f"{mean(one):{form}}" if one else "" for one in found)])
    return lay_out(rows)


def _comparison(known: Mapping[str, Run], problem: str, cells: Sequence[Cell]) -> str:
    """Lay out each contender in its best cell, over the seeds that compare."""
    form = PROBLEMS[problem].metrics[0].form
    found = at_best(known, problem, cells)
    against = [name for name in CONTROLS if name in found]
    rows = [
        ["contender", "best", "figure", *(f"minus {one}" for one in against), "passes"]
    ]
    for name, (cell, figures) in found.items():
        contender = CONTENDERS[name]
        passes = len(PROBLEMS[problem].tasks)
        spread = f"{mean(figures):{form}} +- {stdev(figures):{form}}"
        differences = []
        for one in against:
            difference = paired_difference(figures, found[one][1])
            text = f"{difference.mean:+{form}} +- {difference.margin:{form}}"
            differences.append("-" if one == name else text)
        is_single = contender.in_one and not contender.passes
        rows.append(
            [
                name,
                f"{cell.rate:g}, {cell.weight:g}",
                spread,
                *differences,
                "1" if is_single else str(passes),
            ]
        )
    return lay_out(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.mtl.tuned", description=__doc__
    )
    tuned = [name for name, problem in PROBLEMS.items() if problem.weighted]
    parser.add_argument(
        "--problems", nargs="+", choices=tuned, default=tuned, metavar="NAME"
    )
    for name, default in (("rates", [0.5, 1, 2, 4]), ("weights", [1, 4, 10])):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            type=float,
            default=default,
            metavar="X",
            help=f"(default: {' '.join(map(str, default))})",
        )
    add_runs(parser, STORE)
    return parser


if __name__ == "__main__":
    main()
