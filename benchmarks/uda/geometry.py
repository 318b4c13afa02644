"""Draw what each rule does to two gradients, for the page on the paper.

``python -m benchmarks.uda.geometry docs/pictures`` draws arrows (figures 4 and 7 of the
paper) and, over all obtuse angles, the angles and weights that come out. All is computed
by ``ghopt``; nothing is trained.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.common.extra import need
from benchmarks.common.picture import save
from benchmarks.uda.methods.rules import RULES
from benchmarks.uda.views.style import COLORS, LABELS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ANGLE = 130  # degrees, of the arrows
LENGTHS = (1.0, 1.3)
ANGLES = range(90, 180)  # degrees, of the curves: opposite gradients span no plane
_FORMS = {"sum": ":", "gh": "-", "ghpp": "--", "ghpp_printed": "-."}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.uda.geometry", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="where the pictures are written")
    folder = parser.parse_args(arguments).folder
    try:
        need("bench", "matplotlib")
        folder.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError) as error:
        parser.error(str(error))
    save(draw_arrows(), folder / "paper-rules.svg")
    save(draw_curves(), folder / "paper-angles.svg")


def gradients(degrees: float, lengths: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Make two gradients in the plane, rows of ``[2, 2]``, the first along the x axis."""
    turn = math.radians(degrees)
    first, second = lengths
    rows = [[first, 0.0], [second * math.cos(turn), second * math.sin(turn)]]
    return torch.tensor(rows, dtype=torch.float64)


def harmonized(rule: str, rows: Tensor) -> Tensor:
    """Apply a rule to the gradients in the rows, ``[2, 2]``."""
    return RULES[rule].coefficients(rows @ rows.T) @ rows


def angle_between(rows: Tensor) -> float:
    """Angle of two vectors in the plane, in degrees from 0 to 180."""
    (a, b), (c, d) = rows.tolist()
    return math.degrees(abs(math.atan2(a * d - b * c, a * c + b * d)))


def draw_arrows() -> "Figure":
    """Draw two gradients, what each rule makes of them, and the sum of that."""
    figure = new_figure(2.6)
    rows = gradients(ANGLE, LENGTHS)
    for axes, rule in zip(figure.subplots(1, len(RULES)), RULES, strict=True):
        found = harmonized(rule, rows)
        if rule != "sum":
            for number, gradient in enumerate(rows.tolist(), 1):
                _arrow(axes, gradient, "0.6", f"g{number}")
        marks = ("g1", "g2", "sum") if rule == "sum" else ("1", "2", "sum")
        _arrow(axes, found.sum(0).tolist(), "#E69F00", marks[2])
        for gradient, mark in zip(found.tolist(), marks, strict=False):
            _arrow(axes, gradient, COLORS[rule], mark)
        axes.set_title(
            f"{LABELS[rule]}: {angle_between(found):.0f} degrees", fontsize=9
        )
        axes.set(xlim=(-1.05, 1.5), ylim=(-0.15, 1.85), aspect="equal")
        axes.axis("off")
    return figure


def _arrow(axes: "Axes", to: Sequence[float], color: str, mark: str) -> None:
    """Draw an arrow from the origin, and its name at the end."""
    look = {"arrowstyle": "-|>", "color": color, "lw": 1.8, "shrinkA": 0, "shrinkB": 0}
    x, y = to
    axes.annotate("", (x, y), (0, 0), arrowprops=look)
    away = 1 + 0.12 / math.hypot(x, y)
    axes.text(
        away * x, away * y, mark, color=color, fontsize=8, ha="center", va="center"
    )


def draw_curves() -> "Figure":
    """Draw angles and weights that come out, over the angle of two gradients of length 1."""
    figure = new_figure(3.2)
    angles, weights = figure.subplots(1, 2)
    for rule in RULES:
        pairs = [gradients(degrees) for degrees in ANGLES]
        look: dict[str, Any] = {"color": COLORS[rule], "linestyle": _FORMS[rule]}
        # The sum's curves are wide, to be seen below those of the printed rule.
        look["linewidth"] = 4 if rule == "sum" else 1.5
        shown = [angle_between(harmonized(rule, rows)) for rows in pairs]
        angles.plot(ANGLES, shown, label=LABELS[rule], **look)
        tau = [RULES[rule].weighting(rows @ rows.T).tolist() for rows in pairs]
        for task in (0, 1):
            weights.plot(ANGLES, [one[task] for one in tau], **look)
    angles.set_title("angle of the harmonized gradients, degrees", fontsize=9)
    weights.set_title("weights of both gradients in the update", fontsize=9)
    for axes in (angles, weights):
        axes.set_xlabel("angle of the two gradients, degrees", fontsize=8)
        axes.set_xticks([90, 120, 150, 180])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    angles.set_yticks([0, 45, 90, 135, 180])
    weights.set_ylim(0, 4)
    figure.legend(loc="outside lower center", ncols=len(RULES), fontsize=8)
    return figure


if __name__ == "__main__":
    main()
