"""The pictures of the rules: arrows and curves are what the formulas give."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Annotation

from benchmarks.uda.geometry import (
    ANGLE,
    ANGLES,
    LENGTHS,
    angle_between,
    draw_arrows,
    draw_curves,
    draw_idea,
    gradients,
    losses_at,
    main,
    slopes_at,
    walk,
)

DRAWN = Path(__file__).parents[2] / "docs" / "pictures"


def test_arrows_end_where_the_rules_put_the_gradients() -> None:
    rows = gradients(ANGLE, LENGTHS)
    dot, squares = float(rows[0] @ rows[1]), rows.square().sum(1)
    gh = rows - dot / squares.flip(0)[:, None] * rows.flip(0)
    excess = math.radians(ANGLE - 90) / 2
    turned = [
        [LENGTHS[0] * math.cos(excess), LENGTHS[0] * math.sin(excess)],
        [-LENGTHS[1] * math.sin(excess), LENGTHS[1] * math.cos(excess)],
    ]
    factors = [1 + 2 * math.sin(excess / 2), 1 - 2 * math.sin(excess / 2)]
    printed = torch.tensor(factors).double()[:, None] * rows
    wanted = {
        "plain sum: 130 degrees": rows.tolist(),
        "GH: 50 degrees": gh.tolist(),
        "GH++: 90 degrees": turned,
        "GH++ as printed: 130 degrees": printed.tolist(),
    }
    panels = {panel.get_title(): panel for panel in draw_arrows().axes}
    assert panels.keys() == wanted.keys()
    for title, ends in wanted.items():
        drawn = [one.xy for one in panels[title].texts if isinstance(one, Annotation)]
        *_, total, first, second = drawn
        assert np.allclose([first, second], ends, atol=1e-6)
        assert np.allclose(total, np.sum(ends, 0), atol=1e-6)


def test_curves_are_the_formulas_of_the_page() -> None:
    angles, weights = draw_curves().axes
    degrees = np.array(ANGLES)
    sides = {line.get_label(): np.asarray(line.get_ydata()) for line in angles.lines}
    assert np.allclose(sides["plain sum"], degrees)
    assert np.allclose(sides["GH"], 180 - degrees)
    assert np.allclose(sides["GH++"], 90)
    assert np.allclose(sides["GH++ as printed"], degrees)
    phi = np.radians(degrees - 90)
    rotated = (np.cos(phi / 2) + np.sin(phi / 2)) / np.cos(phi)
    expected = [
        *(np.ones_like(phi), np.ones_like(phi)),
        *(1 + np.sin(phi), 1 + np.sin(phi)),  # minus the cosine of the angle
        *(rotated, rotated),
        *(1 + 2 * np.sin(phi / 4), 1 - 2 * np.sin(phi / 4)),
    ]
    for line, values in zip(weights.lines, expected, strict=True):
        assert np.allclose(np.asarray(line.get_ydata()), values)


def test_an_angle_is_that_of_the_plane() -> None:
    for degrees in (0, 30, 90, 179, 180):
        assert angle_between(gradients(degrees)) == pytest.approx(degrees)


def test_slopes_are_those_of_the_losses() -> None:
    for place in torch.tensor([[-1.6, 2.2], [0.3, -0.7], [3.0, 1.2]]).double():
        wanted = torch.func.jacrev(losses_at)(place)
        torch.testing.assert_close(slopes_at(place), wanted)


def test_paths_do_what_the_pages_say_of_them() -> None:
    ends = {}
    for rule in ("sum", "gh", "ghpp"):
        losses = losses_at(walk(rule))
        ends[rule] = losses[-1]
        rise = losses[-1] - losses.amin(0)
        assert rise[1] < 1e-3
        # GH raises neither loss; the others trade loss 1 for loss 2 at the end.
        assert (rise[0] > 0.3) == (rule != "gh")
        assert (rise[0] < 1e-3) == (rule == "gh")
    assert ends["gh"][0] < ends["sum"][0] / 3
    assert ends["gh"][1] > ends["sum"][1] * 3
    assert ends["gh"].sum() > ends["sum"].sum()
    torch.testing.assert_close(ends["ghpp"], ends["sum"], atol=0.02, rtol=0.0)
    # Where GH ends, no direction serves both.
    last = slopes_at(walk("gh")[-1])
    assert angle_between(last) > 179


def test_the_picture_shows_the_updates_and_the_paths() -> None:
    arrows, plane = draw_idea().axes
    drawn = [one.xy for one in arrows.texts if isinstance(one, Annotation)]
    rows = gradients(ANGLE, LENGTHS)
    assert np.allclose(drawn[:2], rows.tolist(), atol=1e-6)
    assert np.allclose(drawn[2], rows.sum(0).tolist(), atol=1e-6)
    for line, rule in zip(plane.lines[:6:2], ("sum", "gh", "ghpp"), strict=True):
        assert np.allclose(np.stack(line.get_data(), -1), walk(rule))


def test_the_command_draws_the_pictures_of_the_page(tmp_path: Path) -> None:
    main([str(tmp_path / "new")])
    for name in ("idea.svg", "paper-rules.svg", "paper-angles.svg"):
        words = [
            re.findall(r"<text [^>]*>([^<]+)</text>", path.read_text(encoding="utf-8"))
            for path in (tmp_path / "new" / name, DRAWN / name)
        ]
        assert words[0] == words[1]
        assert len(words[0]) > 8
