"""Draw what a step costs beside its peers, from figures that ``--json`` kept.

Each bar is the time of a step over that of the plain step, the losses summed in one pass.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from benchmarks.common.picture import save
from ghopt.extras import from_extra

with from_extra("bench"):
    from matplotlib.figure import Figure as Picture

NETWORKS = {
    "resnet18": "ResNet-18",
    "transformer": "transformer",
    "mlp128": "MLP, batch 128",
    "mlp32": "MLP, batch 32",
    "tiny": "50K parameters",
}
"""Columns of the time table, and what to call them."""

# Colours that colour-blind readers can tell apart (Okabe and Ito).
_OURS, _BOUND, _PEER = "#0072B2", "#999999", "#E69F00"
ROWS = {
    "plain": ("plain sum, one pass", _BOUND),
    "floor": ("K plain passes", _BOUND),
    "ghopt gh": ("ghopt", _OURS),
    "ghopt gh, every 4th": ("ghopt, measure_every=4", _OURS),
    "ghopt gh, features": ("ghopt, features=", _OURS),
    "autojac UPGrad": ("TorchJD, its best", _PEER),
    "autogram UPGrad": ("TorchJD, Gramian engine", _PEER),
    "pytorch_optimizer": ("pytorch_optimizer PCGrad", _PEER),
    "conflictfree PCGrad": ("conflictfree PCGrad", _PEER),
    "paper, three passes": ("the paper's three passes", _PEER),
}
"""Rows of the time table that are drawn, what to call them, and their colours."""

_LONGEST = 6.0  # a bar that is longer ends here, and says its length


def draw(figures: Sequence[dict[str, object]], tasks: int) -> Picture:
    """Draw one panel for each network.

    Args:
        figures: as ``--json`` writes them.
        tasks: number of tasks, K.

    Raises:
        ValueError: if there is no time of this number of tasks.
    """
    times = {
        (str(one["row"]), str(one["column"])): float(str(one["value"]))
        for one in figures
        if one["table"] == "time" and one["tasks"] == tasks and one["value"] is not None
    }
    networks = [name for name in NETWORKS if ("plain", name) in times]
    if not networks:
        raise ValueError(f"tasks must be a number that was timed, got {tasks}")
    rows = [row for row in ROWS if any((row, name) in times for name in networks)]
    picture = Picture(figsize=(11, 0.32 * len(rows) + 1), layout="constrained")
    panels = picture.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    for name, axes in zip(networks, panels, strict=True):
        for place, row in enumerate(rows):
            if (row, name) not in times:
                continue
            ratio = times[row, name] / times["plain", name]
            axes.barh(place, min(ratio, _LONGEST), color=ROWS[row][1])
            axes.text(min(ratio, _LONGEST), place, f" {ratio:.2f}", va="center")
        axes.set(title=NETWORKS[name], xlim=(0, _LONGEST + 1.6), xticks=[0, 1, 2, 4, 6])
        axes.axvline(1, color="0.4", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [ROWS[row][0] for row in rows])
    panels[0].invert_yaxis()
    picture.supxlabel(f"time of a step over that of the plain step, {tasks} tasks")
    return picture


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command: read the figures, and write the picture."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.speed.picture", description=__doc__
    )
    parser.add_argument("picture", type=Path, help="a file, as .svg or .png")
    parser.add_argument(
        "figures",
        nargs="+",
        type=Path,
        help="what --json wrote; of two the later counts",
    )
    parser.add_argument(
        "--tasks", type=int, default=2, metavar="K", help="(default: 2)"
    )
    options = parser.parse_args(arguments)
    texts = [path.read_text(encoding="utf-8") for path in options.figures]
    found = chain.from_iterable(json.loads(text)["figures"] for text in texts)
    picture = draw([*found], options.tasks)
    save(picture, options.picture)


if __name__ == "__main__":
    main()
