"""What the plots of a recording show: read back from the drawn axes."""

import math
import re
import struct
import sys
from dataclasses import replace
from html import unescape
from typing import Any

import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from torch import Tensor
from torch.testing import assert_close

from ghopt import Recorder, Recording, gh, plots
from ghopt.measuring import Harmonization
from ghopt.plots import (
    COLORS,
    MOST_LAYERS,
    MOST_LINES,
    PLOTS,
    before_and_after,
    conflict_rate,
    cosine_map,
    figure,
    layer_conflict,
    new_figure,
    plots_of,
    weights_over_time,
)
from ghopt.report import make_page


def recording_of(
    *jacobians: Tensor,
    names: tuple[str, ...] = (),
    layers: dict[str, Tensor] | None = None,
) -> Recording:
    """Record steps whose task gradients are the rows of these."""
    recorder = Recorder()
    for jacobian in jacobians:
        products = jacobian @ jacobian.T
        given = names or tuple("abcdefghijklmnopqrstuvwxyz"[: len(jacobian)])
        recorder.record(Harmonization(given, products, gh(products)), layers=layers)
    return recorder.flush()


def pair(cosine: float, ratio: float = 1.0) -> Tensor:
    sine = math.sqrt(1 - cosine**2)
    return torch.tensor([[ratio, 0.0], [cosine, sine]], dtype=torch.float64)


def drawn(plot: plots.Plot, recording: Recording) -> Axes:
    axes = new_figure(4, 3).subplots()
    plot(recording, axes)
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # not a subfigure
    return axes


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    found: dict[str, Any] = {}
    for line in axes.get_lines():
        found[str(line.get_label())] = (
            [*map(float, line.get_xdata())],  # type: ignore[arg-type]  # numbers
            [*map(float, line.get_ydata())],  # type: ignore[arg-type]  # numbers
        )
    return found


def test_the_conflict_rate_is_the_share_of_obtuse_angles_in_each_stretch() -> None:
    steps = [pair(-0.5)] * 30 + [pair(-0.5), pair(0.5)] * 15 + [pair(0.5)] * 30
    axes = drawn(conflict_rate, recording_of(*steps, names=("one", "other")))
    x, y = lines(axes)["one / other"]
    assert len(x) == 10
    assert x[0] == 4
    assert y == pytest.approx([100 * n / 9 for n in (9, 9, 9, 6, 5, 4, 3, 0, 0, 0)])
    assert lines(axes)["unrelated gradients"][1] == [50, 50]


def test_steps_without_both_tasks_do_not_count_in_the_conflict_rate() -> None:
    recorder = Recorder()
    products = recording_of(pair(-0.5)).gramians[0]
    for names in (("one", "other"), ("one", "new")):
        recorder.record(Harmonization(names, products, gh(products)))
    recording = recorder.flush()
    first, second = lines(drawn(conflict_rate, recording))["one / other"][1]
    assert first == 100
    assert math.isnan(second)
    shares = recording.conflict_shares
    assert shares == {(0, 1): 1, (0, 2): 1, (1, 2): 0}


def test_of_many_pairs_those_most_in_conflict_are_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(40, 8, 5, generator=generator, dtype=torch.float64)
    recording = recording_of(*steps)
    rates = lines(drawn(conflict_rate, recording))
    shares = {
        f"{recording.names[i]} / {recording.names[j]}": float(
            recording.conflicts[:, i, j].double().mean()
        )
        for i, j in recording.pairs
    }
    assert len(rates) == MOST_LINES + 1
    left_out = shares.keys() - rates.keys()
    worst_left_out = max(shares[name] for name in left_out)
    assert all(shares[name] >= worst_left_out for name in rates.keys() & shares.keys())


@pytest.mark.parametrize("plot", [conflict_rate, weights_over_time])
def test_lines_have_colors_that_color_blind_readers_can_tell_apart(
    plot: plots.Plot,
) -> None:
    axes = new_figure(4, 3).subplots()
    axes.set_prop_cycle(color=["red", "green"])  # as a style of the user's might
    plot(recording_of(*[torch.eye(4) - 0.4] * 3), axes)
    lines = [line.get_color() for line in axes.lines[:-1]]  # but the dotted one
    assert lines == [*COLORS[: len(lines)]]
    assert len(lines) >= 4
    assert len({*COLORS}) == MOST_LINES


def test_areas_and_bars_have_the_same_colors() -> None:
    recording = recording_of(pair(-0.5), layers={"a": pair(-0.5) @ pair(-0.5).T})
    areas = drawn(before_and_after, recording).patches
    assert [to_hex(area.get_facecolor()) for area in areas] == [
        color.lower() for color in COLORS[:2]
    ]
    (bar,) = drawn(layer_conflict, recording).patches
    assert to_hex(bar.get_facecolor()) == COLORS[0].lower()


def test_the_cosine_map_shows_the_mean_cosine_of_each_pair() -> None:
    axes = drawn(cosine_map, recording_of(pair(-0.5), pair(0.26)))
    (image,) = axes.get_images()
    array = image.get_array()
    assert array is not None
    expected = torch.tensor([[1, -0.12], [-0.12, 1]], dtype=torch.float64)
    assert_close(torch.tensor(array.tolist(), dtype=torch.float64), expected)
    assert [text.get_text() for text in axes.texts][1] == "-0.12"
    assert image.get_clim() == (-1, 1)


def test_the_cosines_of_many_tasks_are_colors_alone() -> None:
    axes = drawn(cosine_map, recording_of(torch.eye(MOST_LINES + 1).double()))
    assert not axes.texts


def test_the_cosine_of_an_update_is_that_of_the_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    recording = recording_of(*steps)
    found = recording.update_cosines(recording.weights)
    for row, jacobian, tau in zip(found, steps, recording.weights, strict=True):
        update = tau @ jacobian
        expected = jacobian @ update / jacobian.norm(dim=1) / update.norm()
        assert_close(row, expected)


def test_a_task_without_part_has_no_cosine_even_with_an_update_of_zero() -> None:
    recorder = Recorder()
    for names in (("a", "b"), ("a",)):
        count = len(names)
        products, weights = torch.eye(count).double(), torch.zeros(count).double()
        recorder.record(Harmonization(names, products, weights))
    recording = recorder.flush()
    found = recording.update_cosines(recording.weights)
    assert found[0].tolist() == [0, 0]
    assert found[1, 0] == 0
    assert found[1, 1].isnan()


def test_the_plain_sum_opposes_tasks_that_the_weights_do_not() -> None:
    recording = recording_of(*[pair(-0.9, ratio=5)] * 3)
    axes = drawn(before_and_after, recording)
    plain, weighed = axes.patches
    data = [patch.get_data() for patch in (plain, weighed)]  # type: ignore[attr-defined]  # steps
    below = [
        sum(
            share
            for share, right in zip(d.values, d.edges[1:], strict=True)
            if right < 0
        )
        for d in data
    ]
    assert below == pytest.approx([50, 0])
    assert [sum(d.values) for d in data] == pytest.approx([100, 100])


def with_steps(recording: Recording, cosines: Tensor) -> Recording:
    """Add what the steps did: their cosines with the gradients, ``[n, K]``."""
    limits = torch.full_like(cosines, 1e-6)
    return replace(
        recording, step_cosines=cosines, step_slopes=cosines, step_limits=limits
    )


def test_the_step_is_drawn_beside_the_gradient_with_its_sign_turned() -> None:
    steps = torch.tensor([[-0.5, 0.3], [-0.7, -0.1]], dtype=torch.float64)
    recording = with_steps(recording_of(pair(-0.5), pair(0.5)), steps)
    *_, step = drawn(before_and_after, recording).patches
    assert step.get_label() == "step taken"
    values, edges, _ = step.get_data()  # type: ignore[attr-defined]  # steps
    bins = zip(values, edges[1:], strict=True)
    below = sum(share for share, right in bins if right < 0)
    assert below == pytest.approx(25)  # one of four opposes its task


def test_the_weights_are_drawn_as_they_were() -> None:
    recording = recording_of(*[pair(-0.5, ratio=r) for r in (1, 2, 4)])
    found = lines(drawn(weights_over_time, recording))
    for task, name in enumerate(recording.names):
        assert found[name][1] == pytest.approx(recording.weights[:, task].tolist())
    assert set(found["plain sum"][1]) == {1}  # however far away the weights are


def test_layers_show_the_share_of_steps_with_any_pair_in_conflict() -> None:
    quiet, loud = torch.eye(2), torch.tensor([[1.0, -0.1], [-0.1, 1.0]])
    recorder = Recorder()
    products = torch.eye(2, dtype=torch.float64)
    for second in (loud, quiet):
        layers = {"": quiet, "inner": second}
        found = Harmonization(("a", "b"), products, gh(products))
        recorder.record(found, layers=layers)
    axes = drawn(layer_conflict, recorder.flush())
    widths = [bar.get_width() for bar in axes.patches]  # type: ignore[attr-defined]  # bars
    assert widths == [0, 50]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["(root)", "inner"]


def test_of_many_layers_the_worst_are_shown_in_the_order_of_the_model() -> None:
    loud = torch.tensor([[1.0, -0.1], [-0.1, 1.0]])
    layers = {
        f"layer{n}": loud if n % 2 else torch.eye(2) for n in range(2 * MOST_LAYERS)
    }
    axes = drawn(layer_conflict, recording_of(pair(-0.5), layers=layers))
    shown = [text.get_text() for text in axes.get_yticklabels()]
    assert shown == [f"layer{n}" for n in range(1, 2 * MOST_LAYERS, 2)]


@pytest.mark.parametrize(
    "name", ["$x", "_private", "a$b$", r"a$\frac$", "<b>", "a\x01\ud800b", 300 * "long"]
)
def test_any_name_of_a_task_can_be_drawn(name: str) -> None:
    recording = recording_of(pair(-0.5), pair(0.5), names=(name, "other"))
    for plot in plots_of(recording).values():
        axes = drawn(plot, recording)
        legend = axes.get_legend()
        if legend is not None and plot is weights_over_time:
            texts = [text.get_text().replace("\\$", "$") for text in legend.get_texts()]
            shown = "".join(c if c.isprintable() else "?" for c in name)[:40]
            assert shown in [text.strip() for text in texts]


def test_a_long_recording_is_drawn_with_as_many_points_as_can_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plots, "_POINTS", 10)
    recording = recording_of(*[pair(-0.5)] * 201)
    for plot in (conflict_rate, weights_over_time):
        counts = [len(x) for x, _ in lines(drawn(plot, recording)).values()]
        assert max(counts) == 10


def test_a_figure_has_every_plot_that_there_is_something_for() -> None:
    two = recording_of(pair(-0.5), pair(0.5))
    assert [*plots_of(two)] == [*PLOTS][:4]
    layered = recording_of(pair(-0.5), layers={"x": torch.eye(2)})
    assert plots_of(layered) == PLOTS
    own = recording_of(pair(-0.5), layers={"x": torch.diag(torch.tensor([1.0, 0.0]))})
    assert [*plots_of(own)] == [*PLOTS][:4]  # no layer that two tasks reach
    titles = [axes.get_title() for axes in figure(layered).axes]
    assert [title for title in titles if title] == [*PLOTS]
    alone = recording_of(torch.ones(1, 2, dtype=torch.float64))
    assert [*plots_of(alone).values()] == [before_and_after, weights_over_time]


def test_a_notebook_shows_figures_recordings_and_pages() -> None:
    # What IPython makes of the last expression of a cell, without pyplot.
    recording = recording_of(pair(-0.5), pair(0.5), names=("<up>", "down"))
    display: Any = DisplayFormatter()  # its methods have no types
    drawn_as, _ = display.format(figure(recording))
    width, height = png_size(drawn_as["image/png"])
    assert width > 500
    assert height > 1000
    told, _ = display.format(recording)
    assert "<td>&lt;up&gt;</td><td>down</td><td>50%</td>" in told["text/html"]
    assert told["text/plain"] == "Recording(names=('<up>', 'down'), steps=2)"
    page = make_page(recording, "run")
    framed, _ = display.format(page)
    source = re.fullmatch(
        r'<iframe srcdoc="([^"]*)" [^>]*></iframe>', framed["text/html"]
    )
    assert source is not None
    assert unescape(source[1]) == page


def png_size(content: bytes) -> tuple[int, ...]:
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


def test_an_empty_recording_is_refused() -> None:
    with pytest.raises(ValueError, match="recording must have a step, got none"):
        figure(Recorder().flush())


def test_missing_matplotlib_is_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install \"ghopt\[plot\]\""):
        figure(recording_of(pair(0.5)))
