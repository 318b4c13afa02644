"""Measure what harmonized steps cost and how exact they are, beside every peer.

Times are CPU times of the process on one thread; with `--device cuda`, which nobody has
run yet, they are taken between CUDA events.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch

from benchmarks.common.environment import environment
from benchmarks.common.extra import need
from benchmarks.common.options import positive
from benchmarks.speed.accuracy import direction_errors, gramian_errors, update_errors
from benchmarks.speed.bandwidth import bandwidths
from benchmarks.speed.measure import peak_copies, time_ratios
from benchmarks.speed.methods import AUTO, FLOOR, METHODS, SEPARATE, TASKS, UPGRAD_NEEDS
from benchmarks.speed.problems import NETWORKS
from benchmarks.speed.results import (
    TITLES,
    Figure,
    format_notes,
    format_table,
)
from benchmarks.speed.rules import NUMBERS, QUICK_NUMBERS, rule_times

ROUNDS, QUICK_ROUNDS = 9, 5
QUICK_NETWORKS, QUICK_TASKS = ("mlp32", "tiny"), (2,)
USUAL_TASKS = (1, 2, 4, 8)  # 32 passes through the larger ones take hours
SIZES, LARGE = (10**6, 10**7), 10**8


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command: print each table once it is there, write all figures at last."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _check_peers(options)
    except ImportError as error:
        parser.error(f"{error}; or leave it out: see --methods and --tables")
    torch.set_num_threads(1)
    around = environment(options.device)
    print(", ".join(f"{name} {value}" for name, value in around.items()))
    found: list[Figure] = []
    for figures in _tables(options):
        print(f"\n{format_table(figures)}", flush=True)
        found += figures
    print(f"\n{format_notes([figure.row for figure in found])}")
    if options.json:
        results = {"environment": around, "figures": [asdict(one) for one in found]}
        options.json.write_text(f"{json.dumps(results, indent=1)}\n", encoding="utf-8")


def _check_peers(options: argparse.Namespace) -> None:
    """Find what the tables will import: now, not after an hour of them.

    Raises:
        ImportError: if a package is missing; names it and the extra that installs it.
    """
    wanted = {"time", "memory", "accuracy", "exactness"} & {*options.tables}
    for method in METHODS:
        if wanted and method.name in options.methods:
            need("peers", *method.needs)
    if "rules" in options.tables:
        need("peers", *UPGRAD_NEEDS)


def _tables(options: argparse.Namespace) -> Iterator[list[Figure]]:
    """Measure what was asked for, table by table."""
    wanted, device, rounds = options.tables, options.device, options.rounds
    rounds = rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    networks = options.networks or (QUICK_NETWORKS if options.quick else NETWORKS)
    chosen = [one for one in METHODS if one is FLOOR or one.name in options.methods]
    for tasks in options.tasks or (QUICK_TASKS if options.quick else USUAL_TASKS):
        methods = [method for method in chosen if tasks in method.tasks]
        if "time" in wanted:
            yield _join(
                time_ratios(methods, name, tasks, rounds, device) for name in networks
            )
        if "passes" in wanted and tasks > 1:
            pair = [SEPARATE, AUTO]
            yield _join(
                time_ratios(pair, name, tasks, rounds, device, SEPARATE, "passes")
                for name in networks
            )
        if "memory" in wanted:
            yield _join(peak_copies(methods, name, tasks, device) for name in networks)
        if "bandwidth" in wanted and tasks > 1:
            yield bandwidths(tasks, rounds, device)
    if "accuracy" in wanted:
        yield _join(update_errors(chosen, name) for name in networks)
    if "exactness" in wanted:
        yield direction_errors([method for method in chosen if method.is_gh])
    if "rules" in wanted:
        yield rule_times(QUICK_NUMBERS if options.quick else NUMBERS, rounds)
    if "gramian" in wanted:
        yield gramian_errors([*SIZES, LARGE] if options.large else SIZES)


def _join(parts: Iterable[list[Figure]]) -> list[Figure]:
    return list(chain.from_iterable(parts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.speed", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"two tasks, {' and '.join(QUICK_NETWORKS)}, {QUICK_ROUNDS} rounds: a minute",
    )
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, metavar="NAME", help="(default: all)"
    )
    names = [method.name for method in METHODS]
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help="rows of the tables, beside the floor (default: all)",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        type=int,
        choices=TASKS,
        metavar="K",
        help="numbers of tasks: 1, 2, 4, 8, 32 (default: all)",
    )
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=TITLES,
        default=list(TITLES),
        metavar="NAME",
        help=f"some of: {' '.join(TITLES)} (default: all)",
    )
    parser.add_argument(
        "--rounds", type=positive, metavar="N", help=f"(default: {ROUNDS})"
    )
    parser.add_argument(
        "--large", action="store_true", help="the Gramian also of 1e8 elements: 2 GB"
    )
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cpu"),
        help="of the tables time, memory and bandwidth (default: cpu)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to write all figures"
    )
    return parser


if __name__ == "__main__":
    main()
