"""Draw the paper's figures of domain adaptation; goes on where it stopped.

``python -m benchmarks.uda.figures`` trains what its store, ``runs.jsonl``, lacks and draws
all figures from it: histograms of the gradients' products (Fig. 2 and 12), t-SNE (8), test
errors (9), confusion matrices (10), MMD and max J(W) (11), changed signs (13), lambda (14).
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common.extra import need
from benchmarks.common.options import positive
from benchmarks.common.store import append_run, read_runs
from benchmarks.uda.data import Task, load_task
from benchmarks.uda.methods.features import (
    confusion_matrix,
    embed,
    linear_mmd,
    max_j,
    sample_rows,
    see,
)
from benchmarks.uda.methods.networks import CLASSES, Networks
from benchmarks.uda.methods.rules import FLIPS, LAMBDAS, RULES
from benchmarks.uda.methods.steps import ALL_METHODS, SOURCE_ONLY, Config
from benchmarks.uda.runs import configs
from benchmarks.uda.runs.options import DEMO_STEPS, REAL_STEPS, add_task, find_task
from benchmarks.uda.runs.pool import finished, start_pool
from benchmarks.uda.runs.records import Balance, Points, Result, key_of
from benchmarks.uda.runs.train import run
from benchmarks.uda.views.feature_plots import SHOWN, draw_watched
from benchmarks.uda.views.plots import draw_all

DEFAULT_METHODS = ("CDAN+E", "MCD")
QUICK_STEPS = 20
IMAGES = 1000  # of a domain, for MMD and max J(W)
POINTS = 300  # of a domain, for t-SNE


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command: train what is missing, draw from the store."""
    parser = _parser()
    options = parser.parse_args(arguments)
    name, usual = find_task(options)
    seeds = options.seeds or (1 if options.quick else 3)
    steps = options.steps or (QUICK_STEPS if options.quick else usual)
    wanted = make_configs(name, options.methods, seeds, steps)
    store = options.out / "runs.jsonl"
    try:
        need("bench", "matplotlib", "sklearn", "tqdm")
        known = read_runs(store, Result)
        missing = [one for one in wanted if key_of(one) not in known]
        if missing and not options.show:
            task = load_task(name, options.data, exact=True)
            options.out.mkdir(parents=True, exist_ok=True)
            with start_pool(task, options.workers) as pool:
                for watched in finished(pool, missing, watch):
                    append_run(store, watched)
            known = read_runs(store, Result)
        runs = whole_seeds(known, wanted)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    paths = [*draw_all(runs, options.out), *draw_watched(runs, options.out)]
    whole = len({one.config["seed"] for one in runs})
    print(f"\n{name}: {whole} of {seeds} seeds, {steps} steps. Wrote ", end="")
    print(f"{', '.join(path.name for path in paths)} to {options.out}/")


def make_configs(
    task: str, methods: Iterable[str], seeds: int, steps: int
) -> list[Config]:
    """List the runs of all figures, seed by seed."""
    rules = dict.fromkeys([*RULES, *FLIPS, *LAMBDAS.values()])
    like = Config(task, SOURCE_ONLY, "sum", 0, steps)
    return configs.make_configs(like, [SOURCE_ONLY, *methods], rules, seeds, [1.0])


def watch(config: Config, task: Task) -> Result:
    """Train once, and look at the features.

    t-SNE, which takes longer than many a run, is for the first seed of the rules that
    are drawn.
    """
    rows = sample_rows(len(task.source.images), IMAGES)
    source, labels = task.source.images[rows], task.source.labels[rows]
    target = task.target[sample_rows(len(task.target), IMAGES)]
    balance: list[Balance] = []
    confusion: list[list[int]] = []
    points: dict[str, Points] = {}

    def observe(done: int, networks: Networks) -> None:
        ours, theirs = see(networks, source), see(networks, target)
        balance.append(
            (
                done,
                linear_mmd(ours.features, theirs.features),
                max_j(ours.features, labels, CLASSES),
                max_j(theirs.features, theirs.predicted, CLASSES),
            )
        )
        if done == config.steps:
            test = see(networks, task.test.images)
            table = confusion_matrix(task.test.labels, test.predicted, CLASSES)
            confusion.extend(table.tolist())
            if config.seed == 0 and config.rule in SHOWN:
                drawn = sample_rows(len(test.features), POINTS)
                features = {
                    "source": (ours.features[:POINTS], labels[:POINTS]),
                    "target": (test.features[drawn], task.test.labels[drawn]),
                }
                points.update(embed_domains(features))

    result = run(config, task, observe)
    return replace(result, balance=balance, confusion=confusion, points=points)


def embed_domains(domains: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Points]:
    """Draw the features ``[n, f]`` of all domains in one plane, with their labels."""
    places = embed(torch.cat([features for features, _ in domains.values()])).tolist()
    rows = iter(places)
    return {
        name: [(*next(rows), label) for label in labels.tolist()]
        for name, (_, labels) in domains.items()
    }


def whole_seeds(known: Mapping[str, Result], wanted: Sequence[Config]) -> list[Result]:
    """Choose the wanted runs of those seeds that have all: what is drawn is paired.

    Raises:
        ValueError: if seed 0, the one that t-SNE draws, lacks any.
    """
    lacking = {one.seed for one in wanted if key_of(one) not in known}
    if 0 in lacking:
        raise ValueError("the store lacks runs of seed 0: train without --show")
    return [known[key_of(one)] for one in wanted if one.seed not in lacking]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.uda.figures", description=__doc__
    )
    add_task(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[one for one in ALL_METHODS if one != SOURCE_ONLY],
        default=list(DEFAULT_METHODS),
        help=f"(default: {' '.join(DEFAULT_METHODS)})",
    )
    parser.add_argument(
        "--seeds", type=positive, metavar="N", help="(default: 3, quick 1)"
    )
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help=f"(default: {DEMO_STEPS}, with --data {REAL_STEPS}, quick {QUICK_STEPS})",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed, few steps: to see that it works"
    )
    parser.add_argument(
        "--workers", type=positive, default=2, metavar="N", help="(default: 2)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("uda-figures"),
        metavar="DIR",
        help="folder for the store and the figures (default: uda-figures)",
    )
    parser.add_argument(
        "--show", action="store_true", help="draw what is there, train nothing"
    )
    return parser


if __name__ == "__main__":
    main()
