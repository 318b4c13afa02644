"""Draw the main job's pictures again, from the runs in its folder.

``python -m benchmarks.uda.plots uda-results`` reads ``results.jsonl`` there, and of that
the runs like the last one.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.extra import need
from benchmarks.common.store import read_runs
from benchmarks.uda.methods.rules import RULES
from benchmarks.uda.runs.records import Result
from benchmarks.uda.views.plots import draw_all
from benchmarks.uda.views.style import methods_of


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = ArgumentParser("python -m benchmarks.uda.plots", description=__doc__)
    parser.add_argument("folder", type=Path, help="with the main job's results.jsonl")
    folder = parser.parse_args(arguments).folder
    path = folder / "results.jsonl"
    try:
        need("bench", "matplotlib")
        if not path.exists():
            raise FileNotFoundError(f"No such file: {path}")
        draw_all(like_the_last([*read_runs(path, Result).values()]), folder)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))


def like_the_last(results: Sequence[Result]) -> list[Result]:
    """Choose the runs that differ from the last one in method, rule and seed at most.

    Raises:
        ValueError: if there is none, or a seed lacks a rule, as after a job that was
            killed.
    """

    def common(result: Result) -> dict[str, object]:
        own = {"method", "rule", "seed"}
        return {name: one for name, one in result.config.items() if name not in own}

    chosen = [one for one in results if common(one) == common(results[-1])]
    seeds = {one.config["seed"] for one in chosen}
    there = {(one.method, one.rule, one.config["seed"]) for one in chosen}
    wanted = {
        (method, rule, seed)
        for method in methods_of(chosen)
        for rule in RULES
        for seed in seeds
    }
    if not wanted or wanted - there:
        raise ValueError(
            "the folder has no run, or lacks some: python -m benchmarks.uda trains them"
        )
    return chosen


if __name__ == "__main__":
    main()
