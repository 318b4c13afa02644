"""The digits of the paper's Table 3, over many paired seeds; goes on where it stopped.

``python -m benchmarks.uda.table3 --data DIR`` trains what the file of results lacks, and
prints the table of what it has. Each finished run is one line there, with its settings
and a hash of them and the data: other runs never mix, and a killed one is begun anew.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory

import torch

from benchmarks.common.extra import bench_extra
from benchmarks.common.options import positive
from benchmarks.common.table import lay_out
from benchmarks.uda.data import DEMO, LARGE, REAL, SHA256, SIZE, Task, load_task
from benchmarks.uda.options import add_data, add_device, add_trade_offs
from benchmarks.uda.pool import finished
from benchmarks.uda.results import (
    Kept,
    Result,
    angles,
    append_line,
    hash_of,
    obtuse_share,
    read_runs,
)
from benchmarks.uda.rules import ALL_RULES, FLIPS
from benchmarks.uda.steps import ALL_METHODS, SOURCE_ONLY, Config
from benchmarks.uda.train import run

CPU = torch.device("cpu")
STORE = Path(__file__).with_name("table3.jsonl")

# Numbers of steps, images per batch and learning rate: what shows a signal in the time
# that a CPU has (16x16, LeNet of 30 000 parameters). The script published with the paper,
# for MCD: 50 000 steps at 28x28.
STEPS, BATCH, RATE = 2500, 64, 0.02
QUICK_STEPS = 30

# Below so many seeds the least and the greatest difference are no 95 % apart.
FEWEST = 5

WEIGHTS = (1.0, 2.0, 4.0)
"""Of the alignment loss in the plain sum: the control for rules that re-weigh tasks."""

PAPER = {
    ("mnist-usps", "CDAN+E"): {"sum": 95.6, "gh": 96.8, "ghpp": 96.5},
    ("usps-mnist", "CDAN+E"): {"sum": 98.0, "gh": 98.1, "ghpp": 98.3},
    ("svhn-mnist", "CDAN+E"): {"sum": 89.2, "gh": 90.6, "ghpp": 90.7},
    ("mnist-usps", "MCD"): {"sum": 94.2, "gh": 96.7, "ghpp": 97.3},
    ("usps-mnist", "MCD"): {"sum": 94.1, "gh": 96.8, "ghpp": 97.1},
    ("svhn-mnist", "MCD"): {"sum": 96.2, "gh": 97.5, "ghpp": 97.1},
    ("mnist-usps", "DWL"): {"sum": 97.3, "gh": 98.7, "ghpp": 98.9},
    ("usps-mnist", "DWL"): {"sum": 97.4, "gh": 98.5, "ghpp": 98.6},
    ("svhn-mnist", "DWL"): {"sum": 98.1, "gh": 98.8, "ghpp": 99.1},
    ("mnist-usps", "GVB"): {"sum": 96.3, "gh": 96.7, "ghpp": 96.9},
    ("usps-mnist", "GVB"): {"sum": 95.1, "gh": 95.4, "ghpp": 95.5},
    ("svhn-mnist", "GVB"): {"sum": 90.0, "gh": 91.0, "ghpp": 91.7},
    ("mnist-usps", "SSRT"): {"sum": 98.6, "gh": 98.9, "ghpp": 99.2},
    ("usps-mnist", "SSRT"): {"sum": 99.4, "gh": 99.4, "ghpp": 99.5},
    ("svhn-mnist", "SSRT"): {"sum": 99.2, "gh": 99.3, "ghpp": 99.3},
}
"""Accuracies of Table 3, in percent: the best epoch on the target test set.

SSRT's with a ViT-B/16 that had seen ImageNet-21K.
"""

COMPARED = {"accuracy": "last step", "selected": "selected steps"}
"""What of a run can be compared with the sum's, and its name."""

COLUMNS = (
    "method",
    "rule",
    "last step",
    "selected",
    "minus sum [95 %]",
    "conflict %",
    "mean cos",
    "|g1|/|g2|",
    "null %",
    "paper",
)

NOTES = """\
last step: target test accuracy in percent after the last step, mean +- standard deviation
  of (so many) seeds. selected: where the error on the source's test set was least; no
  label of the target has a part in it.
minus sum: of the {compared}, paired by seed, the sum at the same weight of the alignment
  loss (sum x 2 and x 4: minus the sum x 1); mean, and from five seeds on the 95 %
  bootstrap interval (expanded percentiles).
conflict, mean cos, |g1|/|g2| (median): of alignment (1) and classification (2) over the
  generator, before harmonization, over all updates. null: share of obtuse angles of the
  same gradients with random signs.
paper: Table 3, best epoch on the target's test set, each method in a setting of its own
  (MCD: 28x28, 50 000 steps; SSRT: a ViT-B/16 that had seen ImageNet-21K, where ours is
  small and starts at random)."""


@dataclass(frozen=True, kw_only=True)
class Run(Kept):
    """What is kept of one run.

    Attributes:
        errors: (steps done, target test error).
        validation: (steps done, source validation error).
        device: where it was trained.
    """

    errors: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    device: str = "cpu"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _parser()
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as scratch:
        if options.quick:
            options.tasks, options.seeds, options.steps = [DEMO], 1, QUICK_STEPS
            options.store = Path(scratch, STORE.name)
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
            with bench_extra():
                import scipy  # noqa: F401  # now, not after hours
                import tqdm  # noqa: F401
            known = read_runs(options.store, Run)
            missing = [one for one in configs if key_of(one, device) not in known]
            to_train = missing and not options.show
            if to_train:
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
        # A run that a changed sign ruins says nothing about the choice of a step.
        sound = [one for one in chosen if one.config["rule"] not in FLIPS]
        if sound:
            print(f"\n{describe_oracle(sound)}")
    print(f"\n{NOTES.format(compared=COMPARED[options.compared])}")


def make_configs(
    like: Config,
    methods: Iterable[str],
    rules: Iterable[str],
    seeds: int,
    weights: Sequence[float] | None = None,
) -> list[Config]:
    """List the runs: seed by seed, so that what is there is always paired.

    Args:
        like: what they have in common.
        methods: of every seed.
        rules: of every method that has two losses.
        seeds: how many.
        weights: of the alignment loss, for each rule; None: 1, and ``WEIGHTS`` in the
            plain sum.
    """
    rules = list(rules)

    def weights_of(method: str, rule: str) -> Sequence[float]:
        if method == SOURCE_ONLY:
            return (1.0,)
        return weights or (WEIGHTS if rule == "sum" else (1.0,))

    return [
        replace(like, method=method, rule=rule, seed=seed, trade_off=weight)
        for seed in range(seeds)
        for method in methods
        for rule in (["sum"] if method == SOURCE_ONLY else rules)
        for weight in weights_of(method, rule)
    ]


def train(task: Task, configs: Sequence[Config], store: Path, workers: int) -> None:
    """Train in worker processes; append each run to the store when it is finished."""
    for result in finished(task, configs, run, workers):
        append_line(store, summarize(result, task.target.device))


def summarize(result: Result, device: torch.device) -> Run:
    """Keep the numbers of a run, not its thousands of Gramians."""
    return Run(
        key=_hash(result.config, device),
        config=result.config,
        torch=torch.__version__,
        accuracy=result.accuracy,
        selected=result.selected,
        errors=result.errors,
        validation=result.validation,
        **angles(result.before)._asdict(),
        null=100 * obtuse_share(result.null) if result.null else None,
        device=str(device),
    )


def key_of(config: Config, device: torch.device = CPU) -> str:
    """Hash what a run is of: the configuration, the data and the kind of device.

    Devices drop other units, so runs of two of them are no pairs. Not the code, of which
    the constants of the methods are a part: who changes what a method computes raises its
    number in ``steps.REVISIONS``.
    """
    return _hash(config.settings(), device)


def _hash(settings: dict[str, object], device: torch.device) -> str:
    kind = () if device == CPU else (device.type,)
    return hash_of(settings, SHA256, *kind)


def format_table(runs: Sequence[Kept], compared: str = "accuracy") -> str:
    """Lay out a line per method and rule of one task, with as many seeds as there are.

    ``compared`` is the field that is compared with the sum's: a key of ``COMPARED``.
    """
    rows: list[tuple[str, ...]] = [COLUMNS]
    weights = sorted({float(str(run.config["trade_off"])) for run in runs})
    for method in ALL_METHODS:
        for rule in ALL_RULES:
            for weight in weights:
                own = _by_seed(runs, method, rule, weight)
                base = 1.0 if rule == "sum" else weight
                if own:
                    plain = _by_seed(runs, method, "sum", base)
                    rows.append(_row(own, plain, compared))
    return lay_out(rows, names=2)


def format_layout(tasks: Mapping[str, Sequence[Kept]]) -> str:
    """Lay out the runs of several tasks as the paper's Table 3 does, beside its figures.

    Accuracies after the last step, mean +- standard deviation (number of seeds); the
    mean over the tasks where all have runs. Of the rules at a weight of 1 that change no
    sign.
    """
    heads = [head for name in tasks for head in (name, "paper")]
    rows: list[tuple[str, ...]] = [("method", "rule", *heads, "mean", "paper")]
    for method in ALL_METHODS:
        for rule in (one for one in ALL_RULES if one not in FLIPS):
            found = [_by_seed(runs, method, rule, 1.0) for runs in tasks.values()]
            if any(found):
                values = [[run.accuracy for run in own.values()] for own in found]
                paper = [PAPER.get((name, method), {}).get(rule) for name in tasks]
                means = [mean(own) if own else None for own in values]
                cells = [
                    cell
                    for own, theirs in zip(values, paper, strict=True)
                    for cell in (_count(own), _figure(theirs))
                ]
                name = "-" if method == SOURCE_ONLY else rule
                last = [_figure(_mean_of_all(one)) for one in (means, paper)]
                rows.append((method, name, *cells, *last))
    return lay_out(rows, names=2)


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    known = [one for one in values if one is not None]
    return mean(known) if len(known) == len(values) else None


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def describe_oracle(runs: Sequence[Run]) -> str:
    """Say what the paper's choice of the step, by the labels of the target, would add."""
    gains = [100 - min(error for _, error in run.errors) - run.accuracy for run in runs]
    return (
        "The best step by the target's own test labels, as in the paper, would add "
        f"{mean(gains):.1f} points in the mean, {max(gains):.1f} at most."
    )


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Take the 95 % bootstrap interval of a mean; without end below 5 values.

    Percentiles as far out as Student's t makes them of normal values (Hesterberg, "What
    Teachers Should Know About the Bootstrap", 2015, section 4.3): they hold the mean
    95 times in 100 with 10 values and 92 with 5, where those with bias corrected and
    accelerated (BCa) do 91 and 83 times, too short for so few seeds.
    """
    import numpy as np
    from scipy.stats import bootstrap, norm, t

    count = len(differences)
    if count < FEWEST:
        return -math.inf, math.inf
    if len(set(differences)) == 1:
        return differences[0], differences[0]
    tail = norm.cdf(-math.sqrt(count / (count - 1)) * t.ppf(0.975, count - 1))
    found = bootstrap(
        [differences],
        np.mean,
        confidence_level=1 - 2 * tail,
        method="percentile",
        n_resamples=99_999,
        rng=0,
    ).confidence_interval
    return float(found.low), float(found.high)


def _by_seed(
    runs: Iterable[Kept], method: str, rule: str, weight: float
) -> dict[object, Kept]:
    wanted = {"method": method, "rule": rule, "trade_off": weight}
    return {
        run.config["seed"]: run for run in runs if wanted.items() <= run.config.items()
    }


def _row(
    own: dict[object, Kept], plain: dict[object, Kept], compared: str
) -> tuple[str, ...]:
    first = next(iter(own.values()))
    method, rule, task = (str(first.config[key]) for key in ("method", "rule", "task"))
    weight = float(str(first.config["trade_off"]))
    paired = [
        getattr(run, compared) - getattr(plain[seed], compared)
        for seed, run in own.items()
        if seed in plain and not math.isnan(getattr(run, compared))
    ]
    reference = rule == "sum" and weight == 1
    name = (
        "-"
        if method == SOURCE_ONLY
        else rule
        if weight == 1
        else f"{rule} x {weight:g}"
    )
    paper = PAPER.get((task, method), {}).get(rule if weight == 1 else "")
    return (
        method,
        name,
        _count([run.accuracy for run in own.values()]),
        _spread(run.selected for run in own.values()),
        "-" if reference or not paired else _difference(paired),
        _median(own, lambda run: run.obtuse, ".0f"),
        _median(own, lambda run: run.cosine, "+.3f"),
        _median(own, lambda run: run.ratio, ".3f"),
        _median(own, lambda run: run.null, ".0f"),
        _figure(paper),
    )


def _count(values: Sequence[float]) -> str:
    return f"{_spread(values)} ({len(values)})" if values else "-"


def _spread(values: Iterable[float]) -> str:
    found = [value for value in values if not math.isnan(value)]
    if not found:  # no validation
        return "-"
    return f"{mean(found):.1f}" + (f" +- {stdev(found):.1f}" if len(found) > 1 else "")


def _difference(paired: Sequence[float]) -> str:
    low, high = interval(paired)
    bounds = f" [{low:+.1f}, {high:+.1f}]" if math.isfinite(low) else ""
    return f"{mean(paired):+.1f}{bounds}"


def _median(
    runs: dict[object, Kept], value: Callable[[Kept], float | None], form: str
) -> str:
    found = [one for one in map(value, runs.values()) if one is not None]
    if any(map(math.isnan, found)):  # which have no order
        return format(math.nan, form)
    return format(median(found), form) if found else "-"


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
    parser.add_argument(
        "--workers", type=positive, default=2, metavar="N", help="(default: 2)"
    )
    parser.add_argument(
        "--store",
        type=Path,
        default=STORE,
        metavar="FILE",
        help="where the runs are kept (default: the committed ones)",
    )
    add_device(parser)
    parser.add_argument(
        "--show", action="store_true", help="print what is there, train nothing"
    )
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
