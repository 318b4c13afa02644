"""What a rule costs: a training step with it, over the plain summed step.

``python -m benchmarks.uda.timing`` prints it, as the paper's Table 6 does for MCD.
"""

import argparse
from collections.abc import Sequence

import torch

from benchmarks.common.digits import SIZE
from benchmarks.common.options import positive
from benchmarks.common.table import lay_out
from benchmarks.uda.data import DEMO, LARGE, load_task
from benchmarks.uda.methods.steps import ALL_METHODS, SOURCE_ONLY
from benchmarks.uda.runs.cost import three_passes, time_ratios, updates_of

NOTES = """\
plain: CPU time of a training step with the sum of the losses, in milliseconds.
gh, ghpp: with HarmonizedOptimizer, one backward pass per task, over plain.
three passes: gh as the paper's Algorithm 1 has it, two passes for the weights and one
  of the weighed losses, over plain.
Table 6 of the paper, MCD with GH over MCD: 1.18 (MNIST to USPS), 1.11 (USPS to MNIST)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command: a line per method, on embedded data."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.uda.timing", description=__doc__
    )
    parser.add_argument(
        "--rounds", type=positive, default=100, metavar="N", help="(default: 100)"
    )
    parser.add_argument(
        "--size",
        type=int,
        choices=[SIZE, LARGE],
        default=SIZE,
        help=f"of the images (default: {SIZE})",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        task = load_task(DEMO, size=options.size)
    except ImportError as error:
        parser.error(str(error))
    updates = {**updates_of("gh", "ghpp"), "three passes": three_passes}
    rows = [["method", "plain, ms", *updates]]
    for method in ALL_METHODS:
        if method != SOURCE_ONLY:
            plain, ratios = time_ratios(
                task, method, updates, options.rounds, options.size
            )
            shown = [plain, *ratios.values()]
            rows.append([method, *(f"{one:.2f}" for one in shown)])
    print(f"{lay_out(rows)}\n\n{NOTES}")


if __name__ == "__main__":
    main()
