"""MCD, DWL, CDAN+E as their authors publish them, and harmonized; goes on where it stopped.

``python -m benchmarks.uda.published --data DIR`` trains what the file of results lacks, and
prints the table of what it has. Each finished run is one line there, with its settings and
a hash of them; of one that was stopped there is a checkpoint in ``--scratch``.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.common.extra import need
from benchmarks.common.options import add_runs, positive
from benchmarks.common.store import append_run, read_runs
from benchmarks.uda.data import LARGE, Task
from benchmarks.uda.data.published import TASKS, load_published, load_whole
from benchmarks.uda.methods import published_cdan
from benchmarks.uda.methods.published import (
    BATCH,
    BETA,
    CDAN,
    DECAY,
    INNER_STEPS,
    MCD,
    RATE,
    REFERENCES,
    STEPS,
)
from benchmarks.uda.methods.rules import RULES
from benchmarks.uda.methods.steps import SOURCE_ONLY, Config
from benchmarks.uda.runs.pool import finished, start_pool
from benchmarks.uda.runs.published import (
    PublishedRun,
    checkpoint_of,
    key_of_published,
    run,
)
from benchmarks.uda.views.published_table import NOTES, format_table

STORE = Path(__file__).with_name("published.jsonl")

MCD_LIKE = Config(
    task="",
    method=MCD,
    rule="sum",
    seed=0,
    steps=STEPS,
    batch_size=BATCH,
    lr=RATE,
    momentum=BETA,
    weight_decay=DECAY,
    evaluations=20,
    size=LARGE,
)
CDAN_LIKE = replace(
    MCD_LIKE,
    method=CDAN,
    steps=published_cdan.STEPS,
    batch_size=published_cdan.BATCH,
    lr=published_cdan.RATE,
    momentum=published_cdan.MOMENTUM,
    weight_decay=published_cdan.DECAY,
    evaluations=published_cdan.EPOCHS,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in options.tasks:
        configs = make_configs(
            name, options.methods, options.rules, options.seeds, options.steps
        )
        for whole in (False, True):
            own = [one for one in configs if (one.method == CDAN) == whole]
            try:
                known = read_runs(options.store, PublishedRun)
                missing = [one for one in own if key_of_published(one) not in known]
                task = None
                if missing and not options.show:
                    task = _load(name, options.data, whole=whole)
                    options.store.parent.mkdir(parents=True, exist_ok=True)
            except (ImportError, OSError, ValueError) as error:
                parser.error(str(error))
            if task:
                train(task, missing, options.store, options.workers, options.scratch)
        known = read_runs(options.store, PublishedRun)
        shown = [
            known[key] for one in configs if (key := key_of_published(one)) in known
        ]
        length = f", {options.steps} steps" if options.steps else ""
        print(f"\n{name}, 28x28{length}\n\n{format_table(shown)}")
    print(f"\n{NOTES}")


def _load(name: str, directory: Path | None, *, whole: bool) -> Task:
    if directory is None:
        raise ValueError("Invalid data value: None (--data DIR is needed)")
    need("bench", "numpy", "tqdm")
    return (load_whole if whole else load_published)(name, directory)


def make_configs(
    task: str,
    methods: Sequence[str],
    rules: Sequence[str],
    seeds: int,
    steps: int | None = None,
) -> list[Config]:
    """List the runs: seed by seed, so that what is there is always paired.

    Without ``steps`` each has as many as published.
    A method whose sum is that of another has no run of it, and ``MCD`` and
    ``source-only`` have no other rule.
    """
    return [
        _configure(task, method, rule, seed, steps)
        for seed in range(seeds)
        for method in methods
        for rule in rules
        if (rule == "sum" and REFERENCES[method] == method)
        or (rule != "sum" and method not in (SOURCE_ONLY, MCD))
    ]


def _configure(
    task: str, method: str, rule: str, seed: int, steps: int | None
) -> Config:
    like = CDAN_LIKE if method == CDAN else MCD_LIKE
    return replace(
        like,
        task=task,
        method=method,
        rule=rule,
        seed=seed,
        steps=steps or like.steps,
        inner_steps=INNER_STEPS[method],
    )


def train(
    task: Task, configs: Sequence[Config], store: Path, workers: int, scratch: Path
) -> None:
    """Train in worker processes; append each run to the store when it is finished."""
    # The nearest to its end first: no checkpoint is left lying.
    begun = sorted(configs, key=lambda one: not checkpoint_of(one, scratch).exists())
    with start_pool(task, workers) as pool:
        for result in finished(pool, begun, partial(run, folder=scratch)):
            append_run(store, result)
            (scratch / f"{result.key}.pt").unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.uda.published", description=__doc__
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of mnist.npz and usps.npz"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--methods", nargs="+", choices=list(REFERENCES), default=list(REFERENCES)
    )
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument(
        "--seeds", type=positive, default=5, metavar="N", help="(default: 5)"
    )
    parser.add_argument(
        "--steps", type=positive, metavar="N", help="(default: as published)"
    )
    add_runs(parser, STORE)
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path("uda-results"),
        metavar="DIR",
        help="folder for checkpoints (default: uda-results)",
    )
    return parser


if __name__ == "__main__":
    main()
