"""Draw what each rule does to two gradients, for the README and the page on the paper.

``python -m benchmarks.uda.geometry docs/pictures`` draws arrows (figures 4 and 7 of the
paper), the paths that the rules take on two losses of two numbers, and, over all obtuse
angles, the angles and weights that come out. All is computed by ``ghopt``; no network is
trained.
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
WALKED = ("sum", "gh", "ghpp")  # the rules whose paths are drawn
_START = (-1.6, 2.2)
_RATE, _STEPS = 0.005, 2000


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
    save(draw_idea(), folder / "idea.svg")
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


def losses_at(place: Tensor) -> Tensor:
    """Give two losses of a place in the plane, ``[..., 2]``: a narrow valley and a bowl."""
    x, y = place.unbind(-1)
    valley = 0.075 * x.square() + 1.5 * y.square()
    bowl = 0.5 * (x - 3).square() + 0.15 * (y - 1.2).square()
    return torch.stack([valley, bowl], -1)


def slopes_at(place: Tensor) -> Tensor:
    """Give the gradients of both losses at one place, as rows of ``[2, 2]``."""
    x, y = place
    return torch.stack([0.15 * x, 3 * y, x - 3, 0.3 * (y - 1.2)]).view(2, 2)


def walk(rule: str) -> Tensor:
    """Take steps of gradient descent under a rule; the places, ``[steps + 1, 2]``."""
    places = [torch.tensor(_START, dtype=torch.float64)]
    for _ in range(_STEPS):
        rows = slopes_at(places[-1])
        places.append(places[-1] - _RATE * harmonized(rule, rows).sum(0))
    return torch.stack(places)


def draw_idea() -> "Figure":
    """Draw what becomes of two opposed gradients, and where that leads on two losses."""
    figure = new_figure(3.6)
    arrows, plane = figure.subplots(1, 2, width_ratios=[1, 1.4])
    rows = gradients(ANGLE, LENGTHS)
    for number, gradient in enumerate(rows.tolist(), 1):
        _arrow(arrows, gradient, "0.6", f"g{number}", size=11)
    for rule in WALKED:
        update = harmonized(rule, rows).sum(0).tolist()
        mark = LABELS[rule].removeprefix("plain ")
        aside = {"sum": 0.0, "gh": 0.13, "ghpp": -0.13}[rule]
        _arrow(arrows, update, COLORS[rule], mark, size=11, aside=aside)
    arrows.set(xlim=(-1.1, 1.5), ylim=(-0.2, 2.1), aspect="equal")
    arrows.axis("off")
    arrows.set_title("two gradients, and the update", fontsize=11)
    _draw_walks(plane)
    return figure


def _draw_walks(axes: "Axes") -> None:
    """Draw both losses as lines of equal height, and the path of each rule."""
    wide, high = torch.linspace(-2, 3.6, 80), torch.linspace(-0.7, 2.5, 60)
    x, y = torch.meshgrid(wide, high, indexing="xy")
    heights = losses_at(torch.stack([x, y], -1)).numpy()
    levels = [[0.1, 0.5, 1.5, 4], [0.3, 1.2, 3, 6, 10]]
    for task, color in enumerate(("0.55", "0.8")):
        axes.contour(
            x, y, heights[..., task], levels=levels[task], colors=color, linewidths=1
        )
    for rule in WALKED:
        path = walk(rule).T.numpy()
        axes.plot(*path, _FORMS[rule], color=COLORS[rule], label=LABELS[rule], lw=2.2)
        axes.plot(*path[:, -1], "o", color=COLORS[rule], ms=6)
    for place, mark in (((0, -0.5), "loss 1"), ((3, 1.2), "loss 2")):
        axes.text(*place, mark, color="0.4", fontsize=11, ha="center", va="center")
    axes.plot(*_START, "ks", ms=5)
    axes.set_title("where it leads, from the square", fontsize=11)
    axes.set(xlim=(-2, 3.6), ylim=(-0.7, 2.5), xticks=[], yticks=[])
    axes.legend(loc="upper center", fontsize=11, frameon=True)


def _arrow(
    axes: "Axes",
    to: Sequence[float],
    color: str,
    mark: str,
    size: float = 8,
    aside: float = 0.0,
) -> None:
    """Draw an arrow from the origin, and its name at the end."""
    line = {"arrowstyle": "-|>", "color": color, "lw": 1.8, "shrinkA": 0, "shrinkB": 0}
    x, y = to
    axes.annotate("", (x, y), (0, 0), arrowprops=line)
    away = 1 + 0.12 / math.hypot(x, y)
    look: dict[str, Any] = {
        "color": color,
        "fontsize": size,
        "ha": "center",
        "va": "center",
    }
    axes.text(away * x + aside, away * y, mark, **look)


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
