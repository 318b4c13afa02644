"""Train with several losses under several weightings, on digits, tables, shapes and physics.

Compares the plain sum with the rules of ghopt and of TorchJD, over seeds: what the tasks
reach, how much their gradients conflict, what a step costs. Data comes with two wheels or is generated. Extra ``[mtl]``.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.common.clock import cpu_seconds
from benchmarks.common.environment import environment
from benchmarks.common.extra import need
from benchmarks.common.options import positive
from benchmarks.mtl.problem import Problem
from benchmarks.mtl.problems import PROBLEMS
from benchmarks.mtl.rules import RULES, rules_for
from benchmarks.mtl.table import NOTES, Compared, compare, format_problem, verdict
from benchmarks.mtl.train import Result, run, time_ratio

SEEDS, QUICK_SEEDS, QUICK_STEPS = 4, 1, 60
AROUND = ("date", "device", "threads", "python", "torch", "torchjd")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command: print the table of each problem once it is there."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: {options.json.parent} is no folder")
    torch.set_num_threads(1)
    try:
        seconds = cpu_seconds(partial(_print_all, options))
    except ImportError as error:
        parser.error(str(error))
    print(f"\n{seconds / 60:.1f} minutes of CPU time")


def _print_all(options: argparse.Namespace) -> None:
    """Print the tables and the verdict, and write all figures if asked to."""
    for name in options.problems:  # now, not after minutes of training
        need("mtl", *PROBLEMS[name].needs)
    for rule in options.rules:
        RULES[rule].make()
    seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    around = environment(torch.device("cpu"))
    print(", ".join(f"{name} {around[name]}" for name in AROUND), flush=True)
    found: list[Result] = []
    compared: list[Compared] = []
    ratios: dict[str, dict[str, float]] = {}
    for problem in (PROBLEMS[name] for name in options.problems):
        rules = rules_for(problem, options.rules)
        steps = options.steps or (QUICK_STEPS if options.quick else problem.steps)
        results = _results(problem, rules, seeds, steps)
        ratios[problem.name] = {
            rule: time_ratio(problem, rule) for rule in rules if rule != "sum"
        }
        print(f"\n{format_problem(problem, results, ratios[problem.name])}", flush=True)
        compared += compare(problem, results)
        found += results
    print(f"\n{NOTES}\n\n{verdict(compared, seeds)}")
    if options.json:
        content = {
            "environment": around,
            "results": [asdict(one) for one in found],
            "time": ratios,
        }
        options.json.write_text(f"{json.dumps(content, indent=1)}\n", encoding="utf-8")


def _results(
    problem: Problem, rules: Sequence[str], seeds: int, steps: int
) -> list[Result]:
    """Train a problem under every rule, all rules of a seed one after another."""
    found = []
    for seed in range(seeds):
        for rule in rules:
            print(f"{problem.name} seed {seed} {rule}", file=sys.stderr, flush=True)
            found.append(run(problem, rule, seed, steps))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.mtl", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_SEEDS} seed, {QUICK_STEPS} steps: shows that it works, no more",
    )
    parser.add_argument(
        "--problems",
        nargs="+",
        choices=PROBLEMS,
        default=list(PROBLEMS),
        metavar="NAME",
        help=f"some of: {' '.join(PROBLEMS)} (default: all)",
    )
    parser.add_argument(
        "--rules",
        nargs="+",
        choices=RULES,
        default=list(RULES),
        metavar="NAME",
        help=f"some of: {' '.join(RULES)} (default: all; the sum is always run)",
    )
    parser.add_argument(
        "--seeds", type=positive, metavar="N", help=f"(default: {SEEDS})"
    )
    parser.add_argument(
        "--steps", type=positive, metavar="N", help="(default: the problem's)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to write all figures"
    )
    return parser


if __name__ == "__main__":
    main()
