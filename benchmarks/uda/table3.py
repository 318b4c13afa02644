"""The digits of the paper's Table 3, over many paired seeds; goes on where it stopped.

``python -m benchmarks.uda.table3 --data DIR`` trains what the file of results lacks, and
prints the table of what it has. Each finished run is one line there, with its settings
and a hash of them and the data: other runs never mix, and a killed one is begun anew.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common.digits import SIZE
from benchmarks.common.extra import need
from benchmarks.common.options import add_runs, positive
from benchmarks.common.store import append_run, read_runs
from benchmarks.uda.data import DEMO, LARGE, PACKAGES, REAL, Task, load_task
from benchmarks.uda.methods.rules import ALL_RULES, FLIPS
from benchmarks.uda.methods.steps import ALL_METHODS, SOURCE_ONLY, Config
from benchmarks.uda.runs.configs import make_configs
from benchmarks.uda.runs.options import add_data, add_device, add_trade_offs
from benchmarks.uda.runs.pool import finished, start_pool
from benchmarks.uda.runs.records import KEPT, Run, key_of, summarize
from benchmarks.uda.runs.train import run
from benchmarks.uda.views.paper_table import (
    COMPARED,
    NOTES,
    describe_oracle,
    format_angles,
    format_layout,
    format_table,
)

# Numbers of steps, images per batch and learning rate: what shows a signal in the time
# that a CPU has (16x16, LeNet of 30 000 parameters). The script published with the paper,
# for MCD: 50 000 steps at 28x28.
STEPS, BATCH, RATE = 2500, 64, 0.02
QUICK_STEPS = 30


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _parser()
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as scratch:
        if options.quick:
            options.tasks, options.seeds, options.steps = [DEMO], 1, QUICK_STEPS
            options.store = Path(scratch, KEPT.name)
        _run(parser, options)


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Train what is missing, and print."""
    device = options.device
    wanted = {
        name: make_configs(
            Config(
                *(name, SOURCE_ONLY, "sum", 0),
                *(options.steps, BATCH, RATE),
                size=options.size,
            ),
            options.methods,
            options.rules,
            options.seeds,
            options.trade_offs,
        )
        for name in options.tasks
    }
    for name, configs in wanted.items():
        data = None if name == DEMO else options.data
        try:
            known = read_runs(options.store, Run)
            missing = [one for one in configs if key_of(one, device) not in known]
            to_train = missing and not options.show
            if to_train:
                need("bench", "tqdm", *PACKAGES)  # all, before hours of the first task
                options.store.parent.mkdir(parents=True, exist_ok=True)
            task = load_task(name, data, options.size, exact=True) if to_train else None
            task = task and task.to(device)
        except (ImportError, OSError, ValueError) as error:
            parser.error(str(error))
        if task:
            train(task, missing, options.store, options.workers)
    runs = read_runs(options.store, Run)
    shown = {
        name: [runs[key] for one in configs if (key := key_of(one, device)) in runs]
        for name, configs in wanted.items()
    }
    if len(shown) > 1 and 1 in (options.trade_offs or (1,)):
        print(f"\n{format_layout(shown)}")
    for name, chosen in shown.items():
        size = f"{options.size}x{options.size}"
        print(f"\n{name}, {size}, {options.steps} steps\n")
        print(format_table(chosen, options.compared))
        print(f"\n{format_angles(chosen)}")
        # A run that a changed sign ruins says nothing about the choice of a step.
        sound = [one for one in chosen if one.config["rule"] not in FLIPS]
        if sound:
            print(f"\n{describe_oracle(sound)}")
    print(f"\n{NOTES.format(compared=COMPARED[options.compared])}")


def train(task: Task, configs: Sequence[Config], store: Path, workers: int) -> None:
    """Train in worker processes; append each run to the store when it is finished."""
    with start_pool(task, workers) as pool:
        for result in finished(pool, configs, run):
            append_run(store, summarize(result, task.target.device))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.uda.table3", description=__doc__
    )
    add_data(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=[*REAL, DEMO],
        default=list(REAL[:2]),
        help=f"(default: {' '.join(REAL[:2])})",
    )
    parser.add_argument(
        "--methods", nargs="+", choices=ALL_METHODS, default=list(ALL_METHODS)
    )
    parser.add_argument(
        "--rules", nargs="+", choices=list(ALL_RULES), default=list(ALL_RULES)
    )
    add_trade_offs(parser, None, "1, and in the sum 1 2 4")
    parser.add_argument(
        "--seeds", type=positive, default=10, metavar="N", help="(default: 10)"
    )
    parser.add_argument(
        "--steps", type=positive, default=STEPS, metavar="N", help=f"(default: {STEPS})"
    )
    parser.add_argument(
        "--size",
        type=int,
        choices=[SIZE, LARGE],
        default=SIZE,
        help=f"of the images (default: {SIZE}; the paper's: {LARGE})",
    )
    add_runs(parser, KEPT)
    add_device(parser)
    parser.add_argument(
        "--selected",
        dest="compared",
        action="store_const",
        const="selected",
        default="accuracy",
        help="compare with the sum in the selected steps, not in the last",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_STEPS} steps of one seed on embedded data, kept nowhere",
    )
    return parser


if __name__ == "__main__":
    main()
