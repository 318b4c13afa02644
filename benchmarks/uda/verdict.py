"""Say what the kept runs of Table 3 tell of each rule, and draw it.

``python -m benchmarks.uda.verdict`` counts; ``--draw docs/pictures`` makes the pictures of
this folder's page and of the README, too. Trains nothing.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.digits import SIZE
from benchmarks.common.extra import need
from benchmarks.common.options import add_store
from benchmarks.common.picture import save
from benchmarks.common.store import read_runs
from benchmarks.uda.data import LARGE
from benchmarks.uda.runs.records import KEPT, Run
from benchmarks.uda.views.beside import draw_angles, draw_errors, draw_table3
from benchmarks.uda.views.compared import tasks_of
from benchmarks.uda.views.forest import draw_forest, draw_in_short
from benchmarks.uda.views.verdict import format_verdict

PICTURES = {
    "uda-differences": (draw_forest, SIZE),
    "uda-in-short": (draw_in_short, SIZE),
    "uda-differences-28": (draw_forest, LARGE),
    "uda-table3": (draw_table3, SIZE),
    "uda-angles": (draw_angles, SIZE),
    "uda-errors": (draw_errors, SIZE),
}
"""Who draws which picture, of images of which size."""


STEPS = {
    "selected": "count in the steps selected on the source, not in the last",
    "best": "count in the best steps by the target's own test labels, as the paper does",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.uda.verdict", description=__doc__
    )
    parser.add_argument(
        "--draw", type=Path, metavar="DIR", help="folder for the pictures"
    )
    step = parser.add_mutually_exclusive_group()
    for name, words in STEPS.items():
        step.add_argument(
            f"--{name}", dest="compared", action="store_const", const=name, help=words
        )
    add_store(parser, KEPT)
    options = parser.parse_args(arguments)
    try:
        runs = [*read_runs(options.store, Run).values()]
        tasks = {size: tasks_of(runs, size) for size in (SIZE, LARGE)}
        if options.draw:
            need("bench", "matplotlib")
            options.draw.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(format_verdict(tasks[SIZE], options.compared or "accuracy"))
    if options.draw:
        for name, (draw, size) in PICTURES.items():
            save(draw(tasks[size]), options.draw / f"{name}.svg")


if __name__ == "__main__":
    main()
