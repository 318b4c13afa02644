"""The report: what it says of which recordings, and that a browser shows it all."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ghopt import (
    Harmonization,
    Recorder,
    Recording,
    gh,
    ghpp_printed,
    measure,
    report,
)
from ghopt.plots import PLOTS
from ghopt.report import FEWEST_STEPS, judge, make_page, pairs_of
from tests.test_plots import pair, recording_of, with_steps

MANY = 120


def mixed(*steps: tuple[int, Tensor]) -> Recording:
    """Record so many steps of each of some Jacobians, in a random order."""
    every = [jacobian for count, jacobian in steps for _ in range(count)]
    draws = torch.Generator().manual_seed(0)
    order = torch.randperm(len(every), generator=draws).tolist()
    return recording_of(*[every[place] for place in order])


def said(recording: Recording) -> str:
    verdict = judge(recording)
    return " ".join([*verdict.findings, *verdict.advice])


def layered(
    steps: int = MANY, tasks: tuple[str, ...] = ("up", "<down> & $out$")
) -> Recording:
    """Record steps of which every second one is in conflict, in one of two layers."""
    recorder = Recorder()
    agree, fight = recording_of(pair(0.5)), recording_of(pair(-0.5))
    for step in range(steps):
        products = (fight if step % 2 else agree).gramians[0]
        found = step_of(products, tasks)
        layers = {"trunk.0": agree.gramians[0], "trunk.2": products}
        recorder.record(found, rate=0.1, layers=layers)
    return recorder.flush()


def step_of(products: Tensor, names: tuple[str, ...]) -> Harmonization:
    return Harmonization(names, products, gh(products))


# The verdict.


def test_it_says_how_often_how_strong_which_tasks_and_which_layers() -> None:
    text = said(layered(tasks=("up", "down")))
    assert "In 50% of the 120 recorded steps two tasks were in conflict" in text
    assert '"up" and "down": in 50% of their steps' in text
    assert "median cosine of -0.50" in text
    assert '"trunk.2" has a pair in conflict most often, in 50% of the steps' in text
    assert 'Least often "trunk.0": 0%.' in text


def test_a_weighting_is_worth_trying_where_the_sum_often_opposes_a_task() -> None:
    # A gradient twice as long, at 120 degrees and more: the sum opposes the other.
    text = said(mixed((30, pair(-0.8, ratio=2)), (70, pair(0.5))))
    assert "the plain sum of the gradients works against a task" in text
    assert "In 30% of the steps the plain sum" in text
    assert "weighted as recorded it does in 0%" in text
    assert "A weighting is worth trying" in text


def test_no_weighting_is_advised_for_what_is_opposed_by_design() -> None:
    # A penalty is not always told: its noise may leave a fifth of the steps without conflict.
    for opposing in (12, 60):
        agreeing = MANY - opposing
        text = said(mixed((opposing, pair(-0.8, ratio=2)), (agreeing, pair(0.5))))
        assert "worth trying" in text or "may help" in text
        assert "But leave losses alone that are opposed by design" in text


def test_a_layer_that_one_task_alone_reaches_is_left_out() -> None:
    recorder = Recorder()
    products = recording_of(pair(-0.5)).gramians[0]
    own = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    for _ in range(MANY):
        layers = {"trunk": products, "head": own, "nobody": 0 * own}
        recorder.record(step_of(products, ("a", "b")), layers=layers)
    recording = recorder.flush()
    assert recording.layer_shares == {"trunk": 1.0}
    text = said(recording)
    assert "Least often" not in text
    assert "head" not in text


def test_weights_that_oppose_a_task_are_told() -> None:
    recorder = Recorder()
    products = recording_of(pair(-0.8, ratio=5)).gramians[0]
    for _ in range(MANY):
        weights = ghpp_printed(products)
        assert float((products @ weights).min()) < 0
        recorder.record(Harmonization(("a", "b"), products, weights))
    assert "weighted as recorded it does in 100%" in said(recorder.flush())


@pytest.mark.parametrize(
    ("opposing", "advice"),
    [(10, "may help"), (3, "Expect little"), (0, "Expect little")],
)
def test_the_less_the_sum_opposes_the_less_is_promised(
    opposing: int, advice: str
) -> None:
    recording = mixed(
        (2 * opposing, pair(-0.8, ratio=2)),
        (60, pair(-0.3)),  # in conflict, but the sum serves both
        (140 - 2 * opposing, pair(0.5)),
    )
    assert advice in said(recording)


def test_steps_that_oppose_tasks_are_told_and_project_step_is_advised() -> None:
    recording = recording_of(*[pair(-0.5)] * MANY)
    cosines = torch.full((MANY, 2), -0.5, dtype=torch.float64)
    cosines[: MANY // 2, 1] = 0.1
    text = said(with_steps(recording, cosines))
    assert "the step taken, worked against a task in 50%" in text
    assert "project_step=True" in text
    cosines[MANY // 10 :, 1] = -0.1
    text = said(with_steps(recording, cosines))
    assert "against a task in 10% of 120 steps" in text
    assert "project_step=True" not in text
    few = with_steps(recording_of(*[pair(-0.5)] * 10), cosines[:10].abs())
    assert "project_step=True" not in said(few)
    assert "the step taken" not in said(recording)


def test_steps_are_not_blamed_where_the_gradients_oppose_as_often() -> None:
    recorder = Recorder()
    products = recording_of(pair(-0.8, ratio=5)).gramians[0]
    for _ in range(MANY):
        weights = ghpp_printed(products)
        recorder.record(Harmonization(("a", "b"), products, weights))
    cosines = torch.full((MANY, 2), 0.1, dtype=torch.float64)
    assert "project_step" not in said(with_steps(recorder.flush(), cosines))


def ruled(recording: Recording, rule: str) -> Recording:
    return replace(recording, rules=(rule,) * len(recording))


def test_a_training_with_a_rule_is_not_told_to_begin_with_it() -> None:
    recording = mixed((60, pair(-0.8, ratio=2)), (60, pair(0.5)))
    text = said(ruled(recording, "gh"))
    assert "Begin with ghopt.gh" not in text
    assert 'Recorded was a training with "gh"' in text
    assert "only the same training with plain_sum can tell" in text
    # What was summed, or is not known, is advised as ever.
    for rule in ("", "plain_sum"):
        assert "Begin with ghopt.gh" in said(ruled(recording, rule))


def test_tasks_opposed_by_design_are_a_trade_off() -> None:
    names = ("reconstruction", "divergence")
    text = said(recording_of(*[pair(-0.99, ratio=2)] * MANY, names=names))
    assert 'A trade-off, not a conflict: "reconstruction" and "divergence"' in text
    assert 'protect=("reconstruction",)' in text
    assert "worth trying" not in text
    # The noise of batches leaves less than the opposite.
    noise = 0.05 * torch.randn(MANY, generator=torch.Generator().manual_seed(0))
    assert "A trade-off, not a conflict" in said(series(-0.72 + noise.double()))
    # Not where they agree now and then, nor where the angle is less than straight.
    assert "A trade-off" not in said(mixed((110, pair(-0.99)), (10, pair(0.5))))
    assert "A trade-off" not in said(recording_of(*[pair(-0.5)] * MANY))
    assert "A trade-off" not in said(recording_of(*[pair(-0.99)] * 10))


def test_tasks_whose_opposition_still_changes_may_be_a_trade_off_or_not() -> None:
    cosines = torch.linspace(-0.99, -0.7, MANY).tolist()
    text = said(recording_of(*[pair(cosine, ratio=2) for cosine in cosines]))
    assert 'A trade-off, or a conflict? "a" and "b" want the opposite in 100%' in text
    assert "A trade-off, not a conflict" not in text
    assert "worth trying" in text
    nearly_right = torch.linspace(-0.04, -0.01, MANY)
    assert "A trade-off" not in said(series(nearly_right))


def test_no_layer_is_called_worst_where_all_tie() -> None:
    recorder = Recorder()
    products = recording_of(pair(-0.5)).gramians[0]
    for _ in range(MANY):
        layers = {"one": products, "other": products}
        recorder.record(step_of(products, ("a", "b")), layers=layers)
    text = said(recorder.flush())
    assert "No layer stands out: each has a pair in conflict in 100%." in text
    assert "most often" not in text.split("No layer")[1]


def test_tasks_that_agree_need_no_weighting() -> None:
    text = said(mixed((4, pair(-0.8)), (96, pair(0.5))))
    assert "The tasks agree." in text
    assert "worth trying" not in text


def test_angles_that_are_nearly_right_are_called_weak_however_many_are_obtuse() -> None:
    text = said(mixed((60, pair(-0.02)), (60, pair(0.02))))
    assert "The conflicts are weak" in text
    assert "unrelated tasks look like that" in text


def test_losses_of_uneven_gradients_are_to_be_scaled_first() -> None:
    recording = recording_of(*[pair(-0.5, ratio=35)] * MANY, names=("loud", "quiet"))
    text = said(recording)
    assert "Scale the losses first" in text
    assert '"loud" are typically 35 times as long as those of "quiet"' in text
    assert 'larger one on that of "quiet"' in text
    even = recording_of(*[pair(-0.5, ratio=3)] * MANY)
    assert "Scale the losses" not in said(even)


def test_the_longer_gradients_are_named_first_whichever_task_has_them() -> None:
    recording = recording_of(*[pair(-0.5, ratio=0.05)] * 3, names=("quiet", "loud"))
    (found,) = pairs_of(recording)
    assert found.names == ("loud", "quiet")
    assert found.ratio == pytest.approx(20)
    assert found.share == 1
    assert found.cosine == pytest.approx(-0.5)


def test_a_few_conflicts_are_no_agreement() -> None:
    recording = mixed((12, pair(-0.3)), (108, pair(0.5)))
    assert "The tasks agree" not in said(recording)


def test_weak_conflicts_that_add_up_are_not_called_weak() -> None:
    rows = torch.eye(33, dtype=torch.float64)[:32]
    rows[0, 1:32] = -0.045
    recording = recording_of(
        *[rows] * MANY, names=tuple(f"task {number}" for number in range(32))
    )
    assert "In 100% of the steps the plain sum" in said(recording)
    assert "worth trying" in said(recording)


def test_a_right_angle_to_the_update_is_not_against_it() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    products = jacobian @ jacobian.T
    recorder = Recorder()
    for _ in range(MANY):
        recorder.record(Harmonization(("a", "b"), products, torch.ones(2).double()))
    assert "weighted as recorded it does in 0%" in said(recorder.flush())


def test_what_rounding_leaves_of_a_right_angle_is_not_against_it() -> None:
    low = 1 + 1e-9
    products = torch.tensor([[1.0, -low], [-low, 4.0]], dtype=torch.float64)
    recorder = Recorder()
    for _ in range(MANY):
        recorder.record(Harmonization(("a", "b"), products, torch.ones(2).double()))
    assert "In 0% of the steps the plain sum" in said(recorder.flush())


def test_steps_that_are_not_finite_are_told_and_left_out() -> None:
    good, bad = pair(-0.8, ratio=2), pair(-0.8) * torch.nan
    text = said(recording_of(*[good] * 6, *[bad] * 54))
    assert "54 steps that were not finite are left out." in text
    assert "In 100% of the 6 recorded steps" in text
    text = said(recording_of(*[bad] * 60))
    assert "No step was finite" in text
    assert make_page(recording_of(bad, bad), "x")


def test_tasks_that_never_meet_are_not_called_one() -> None:
    recorder = Recorder()
    one = torch.ones(1, 1, dtype=torch.float64)
    for step in range(MANY):
        recorder.record(Harmonization(("ab"[step % 2],), one, one[0]))
    assert "no two tasks in the same one" in said(recorder.flush())


def test_a_task_without_gradients_is_named() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    recording = recording_of(*[jacobian] * MANY, names=("some", "none"))
    assert "Without any gradient: none." in said(recording)
    assert "Without" not in said(recording_of(*[pair(0.5)] * MANY))


def test_a_share_that_rounds_to_nothing_is_more_than_nothing() -> None:
    recording = recording_of(pair(-0.5), *[pair(0.5)] * 400)
    assert "In less than 1% of the 401 recorded steps" in said(recording)


def test_a_layer_counts_in_the_steps_in_which_it_was_recorded() -> None:
    recorder = Recorder()
    products = recording_of(pair(-0.5)).gramians[0]
    for step in range(MANY):
        layers = {"late": products} if step > MANY - 10 else {}
        recorder.record(step_of(products, ("a", "b")), layers=layers)
    text = said(recorder.flush())
    assert '"late" has a pair in conflict most often, in 100% of the steps' in text
    assert "Least often" not in text


def test_nothing_is_concluded_of_a_few_steps() -> None:
    few = [pair(-0.8, ratio=20)] * (FEWEST_STEPS - 1)
    assert "Too short to tell: 99 steps" in said(recording_of(*few))
    assert "worth trying" not in said(recording_of(*few))
    assert "Too short" not in said(recording_of(*few, few[0]))


# How sure it is.


def toy(seed: int, steps: int) -> Recording:
    """Train as the README's first example does, and measure."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    recorder = Recorder()
    for _ in range(steps):
        out = model(torch.randn(32, 8))
        losses = (out[:, 0] - 1).square().mean(), (out.sum(1) + 1).square().mean()
        measure(losses, model.parameters(), recorder=recorder)
        torch.autograd.backward(sum(losses))
        optimizer.step()
        optimizer.zero_grad()
    return recorder.flush()


def test_seeds_of_one_training_are_not_given_contradicting_advice() -> None:
    # Over twelve seeds the sum opposes a task in none of the steps, or in nearly all.
    advices: dict[int, set[str]] = {50: set(), 100: set(), 150: set()}
    shares = []
    for seed in range(12):
        recording = toy(seed, 150)
        for steps, found in advices.items():
            part = recording.where(torch.arange(150) < steps)
            found |= {kind for kind in KINDS if kind in " ".join(judge(part).advice)}
            opposed = part.opposed(torch.ones_like(part.weights)).any(1)
            shares.append(float(opposed.double().mean()))
    assert min(shares) == 0
    assert max(shares) > 0.9
    assert advices[50] == {"Too short to tell"}
    for steps in (100, 150):
        assert "Too short to tell" in advices[steps]
        assert advices[steps] <= {"Too short to tell", "worth trying", "may help"}


KINDS = (
    "Too short to tell",
    "worth trying",
    "may help",
    "Expect little",
    "tasks agree",
    "conflicts are weak",
    "not a conflict",
)


def series(cosines: Tensor, ratio: float = 1.0) -> Recording:
    clipped = cosines.clamp(-0.99, 0.99).tolist()
    return recording_of(*[pair(cosine, ratio) for cosine in clipped])


def test_it_says_how_sure_it_is() -> None:
    text = said(mixed((30, pair(-0.8, ratio=2)), (70, pair(0.5))))
    found = re.search(
        r"so that for it 100 count as (\d+)\..* in (\d+)% to (\d+)% of the", text
    )
    assert found is not None
    count, low, high = map(int, found.groups())
    assert 70 <= count <= 100
    assert 20 <= low < 25
    assert 35 < high <= 42
    assert f"against a task, in {low}% to {high}% of the steps (95 % sure)" in text


def test_what_changed_over_the_recording_is_told() -> None:
    steady = mixed((60, pair(-0.8, ratio=2)), (60, pair(0.5)))
    assert "It changed" not in said(steady)
    text = said(recording_of(*[pair(-0.8, ratio=2)] * 60, *[pair(0.5)] * 60))
    assert "in 100% of the first half of the steps, in 0% of the second" in text


def test_a_recording_that_could_end_either_way_is_too_short() -> None:
    # One wave, of which a sixth lies where the sum opposes a task.
    wave = 0.3 + 0.9 * torch.linspace(0, 6.28, 150).cos()
    text = said(series(wave, ratio=3))
    assert "Too short to tell, or too uneven" in text
    assert re.search("that for the share of the sum 150 steps count as [2-9]\\.", text)
    assert not any(kind in text for kind in KINDS[1:])


def test_little_is_promised_only_of_steady_recordings() -> None:
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    assert "Expect little" in said(series(-0.3 + 0.1 * noise))
    drifting = torch.linspace(-0.5, -0.1, 200) + 0.03 * noise
    text = said(series(drifting))
    assert "Too short to tell, or too uneven" in text
    assert "Expect little" not in text
    # What is worth trying is tried, be it steady or not.
    assert "worth trying" in said(series(drifting - 0.3, ratio=5))


def test_tasks_agree_where_they_are_few_steps_but_far_from_conflict() -> None:
    noise = torch.randn(150, generator=torch.Generator().manual_seed(0)).double()
    drift = torch.linspace(0, 1, 150)
    assert "The tasks agree" in said(series(0.9 - 0.1 * drift + 0.01 * noise))
    text = said(series(0.9 - 0.85 * drift + 0.01 * noise))
    assert "Too short to tell, or too uneven" in text


def test_a_plain_loop_is_not_taken_for_a_harmonized_one() -> None:
    recording = toy(1, FEWEST_STEPS)
    assert set(recording.rules) == {""}
    assert "Recorded was a training with" not in said(recording)


def test_a_single_task_is_in_conflict_with_nothing() -> None:
    recording = recording_of(*[torch.ones(1, 2, dtype=torch.float64)] * MANY)
    assert "in conflict with nothing" in said(recording)
    assert make_page(recording, "x")


def test_pairs_come_worst_first_and_tasks_that_never_met_are_left_out() -> None:
    recorder = Recorder()
    for names, cosine in ((("a", "b"), 0.5), (("b", "c"), -0.5), (("a", "b"), -0.1)):
        products = recording_of(pair(cosine)).gramians[0]
        recorder.record(step_of(products, names))
    shares = {found.names: found.share for found in pairs_of(recorder.flush())}
    assert [*shares.values()] == [1, 0.5]
    assert {frozenset(names) for names in shares} == {
        frozenset("ab"),
        frozenset("bc"),
    }


def test_a_zero_gradient_has_no_ratio() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    (found,) = pairs_of(recording_of(jacobian))
    assert (found.ratio, found.share, found.cosine) == (1, 0, 0)


# The command and its page.


def test_the_command_writes_the_page_and_prints_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    layered().to_jsonl(file)
    command = [sys.executable, "-m", "ghopt.report", str(file)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said(layered()) in " ".join(printed.splitlines())
    assert f"Written to {tmp_path / 'run.html'}." in printed
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert page == make_page(layered(), "run.jsonl")  # the same again, to the byte
    report.main([str(file), "--out", str(tmp_path / "other.html")])
    assert (tmp_path / "other.html").read_text(encoding="utf-8") == page


def test_a_page_holds_all_that_it_shows() -> None:
    page = make_page(layered(), "run")
    addresses = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert len(addresses) == len(PLOTS) + 1
    assert all(address.startswith("data:") for address in addresses)
    assert "<script" not in page
    assert "url(" not in page


def test_names_cannot_break_the_page() -> None:
    page = make_page(layered(), "<title>")
    assert "<down>" not in page
    assert "&lt;down&gt; &amp; $out$" in page
    assert "<title>Conflict of tasks: &lt;title&gt;</title>" in page


@pytest.mark.parametrize("text", [None, "", "{}\n"])
def test_a_file_without_a_recording_is_an_error_of_the_command(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.jsonl"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit):
        report.main([str(file)])
    assert re.search("No such file|got none|in its line 1", capsys.readouterr().err)
    assert not (tmp_path / "run.html").exists()


@pytest.mark.parametrize("out", ["run.jsonl", "no-folder/run.html"])
def test_a_page_that_cannot_be_written_there_is_an_error_of_the_command(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.jsonl"
    layered().to_jsonl(file)
    before = file.read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        report.main([str(file), "--out", str(tmp_path / out)])
    assert re.search("must not be the recording|No such", capsys.readouterr().err)
    assert file.read_text(encoding="utf-8") == before


def test_missing_matplotlib_is_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install \"ghopt\[plot\]\""):
        make_page(layered(), "run")


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs chromium and chromedriver, as .ci/run installs them")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")  # which it refuses to have as root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    with webdriver.Chrome(options, service) as found:
        yield found


@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_the_page_on_a_phone_and_on_a_desk(
    width: int, browser: Any, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    many = ("a task with a rather long name", "another_task_with_a_long_name")
    page.write_text(make_page(layered(tasks=many), "run.jsonl"), encoding="utf-8")
    size = {
        "width": width,
        "height": 800,
        "deviceScaleFactor": 1,
        "mobile": width < 500,
    }
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    assert browser.title == "Conflict of tasks: run.jsonl"
    # No part is wider than the window: nobody must scroll sideways.
    assert (
        browser.execute_script("return document.documentElement.scrollWidth") <= width
    )
    plots = browser.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, "
        "i.clientWidth, i.getBoundingClientRect().right])"
    )
    assert len(plots) == len(PLOTS)
    for complete, natural, shown, right in plots:
        assert complete
        assert natural > 400
        assert shown >= 280
        assert right <= width
    # In two columns on a desk, one below the other on a phone.
    columns = {round(right) for *_, right in plots}
    assert len(columns) == (1 if width < 500 else 2)
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('p, li, td')].map("
        "e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 14
