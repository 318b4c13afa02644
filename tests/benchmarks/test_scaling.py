"""What a step sends and keeps on many GPUs: limits, parts by hand, counts on ranks."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.scaling import __main__ as command
from benchmarks.scaling.check import (
    DDP,
    KEPT,
    SHARDED,
    Counts,
    Line,
    check,
    format_lines,
    predict,
)
from benchmarks.scaling.model import (
    NETWORKS,
    Network,
    ddp_copies,
    ddp_memory,
    ddp_sent,
    fsdp_memory,
    fsdp_sent,
    passes,
    shard_memory,
)
from benchmarks.scaling.table import WORLDS

README = Path(command.__file__).with_name("README.md").read_text(encoding="utf-8")


def test_a_plain_step_is_three_forward_passes_and_each_further_task_two_more() -> None:
    assert [passes(tasks) for tasks in (1, 2, 3, 4)] == [3, 5, 7, 9]
    # One more for each backward pass, and so for the plain step.
    assert [passes(tasks, recompute=True) for tasks in (1, 2, 4)] == [4, 7, 13]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
@pytest.mark.parametrize("world", WORLDS)
def test_one_task_keeps_what_the_plain_step_does(network: Network, world: int) -> None:
    assert ddp_memory(network, 1) == ddp_memory(network, 0)
    assert shard_memory(network, world, 1) == shard_memory(network, world, 0)


@pytest.mark.parametrize("world", [2, 8, 1024])
def test_what_is_sent_grows_by_the_same_with_every_task(world: int) -> None:
    under_ddp = [ddp_sent(world, tasks, 1e9) for tasks in range(6)]
    assert under_ddp[1] == pytest.approx(2e9 * (world - 1) / world)
    share = (world - 1) / world
    again = [fsdp_sent(world, tasks, 1e9, 2e9) / share for tasks in range(1, 6)]
    kept = [fsdp_sent(world, t, 1e9, 2e9, keep=True) / share for t in range(1, 6)]
    assert under_ddp == pytest.approx([tasks * under_ddp[1] for tasks in range(6)])
    assert again == pytest.approx([4e9, 7e9, 10e9, 13e9, 16e9])
    assert kept == pytest.approx([4e9, 6e9, 8e9, 10e9, 12e9])


def test_a_rank_by_itself_sends_nothing() -> None:
    assert ddp_sent(1, 4, 1e9) == 0
    assert fsdp_sent(1, 4, 1e9, 1e9) == 0


def test_ddp_keeps_one_more_copy_of_the_gradients_with_every_task() -> None:
    assert [ddp_copies(tasks) for tasks in (0, 1, 2, 3)] == [2, 2, 3, 4]
    # Without bucket views the plain step has a copy too many already.
    assert ddp_copies(0, bucket_view=True) == 1
    assert ddp_copies(2, bucket_view=True) == 3


def test_fsdp_keeps_one_more_shard_with_every_task_and_the_parameters_if_asked() -> (
    None
):
    again = [fsdp_memory(8, tasks, 2e9, 4e9, 20) for tasks in (1, 2, 3)]
    kept = [fsdp_memory(8, tasks, 2e9, 4e9, 20, keep=True) for tasks in (1, 2, 3)]
    assert [b - a for a, b in pairwise(again)] == pytest.approx([0.5e9, 0.5e9])
    assert kept[0] == again[0]
    # The last shard of gradients takes the place of the parameters as these are freed.
    assert kept[1] - again[1] == pytest.approx(2e9 - 0.5e9)
    assert again[0] == pytest.approx(0.5e9 + (3 * 2e9 + 4e9) / 20)


def test_memory_is_weights_moments_gradients_and_what_passes_need() -> None:
    """By hand: 16 bytes a parameter, the copy in bfloat16 and the activations."""
    network = Network("tiny", 1e6, layers=2, width=8, tokens=4)
    activations = 4 * 8 * 34 * 2
    # 12 N of state, one idle bucket, and what is larger: gradients, or copy and graph.
    assert ddp_memory(network, 0) == 12e6 + 4e6 + max(4e6, 2e6 + activations)
    assert ddp_memory(network, 2) - ddp_memory(network, 0) == 4e6
    block = (3 * 2e6 + 4e6) / 2
    assert shard_memory(network, 4, 0) == 3e6 + max(activations, 1e6) + block
    assert shard_memory(network, 4, 3) - shard_memory(network, 4, 0) == 2 * 1e6


def test_the_readme_quotes_the_tables_as_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main([]) == 0
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in README


@pytest.mark.slow
def test_real_steps_on_two_ranks_send_and_keep_what_the_model_says() -> None:
    lines = check([2], tasks=(3,))
    assert len(lines) == 4 * 2
    assert all(line.agrees for line in lines), format_lines(lines)
    # Not empty counts, which would agree with empty predictions.
    assert min(line.counted.sent for line in lines) > 1e7
    quoted = [row.split() for row in README.splitlines()]
    shown = format_lines([line for line in lines if line.scheme == DDP])
    assert shown.count("\n") == 3
    assert all(row.split() in quoted for row in shown.splitlines())


def test_the_readme_quotes_the_check_in_its_layout() -> None:
    (quoted,) = re.findall(r"```text\n( +messages.*?)\n\n", README, re.DOTALL)
    lines = []
    for row in quoted.splitlines()[2:]:
        scheme, world, tasks, *numbers = re.split(" {2,}", row)
        predicted, counted = (
            Counts(int(messages), int(sent), float(copies))
            for messages, sent, copies in (numbers[::2], numbers[1::2])
        )
        count = 0 if tasks == "plain" else int(tasks)
        lines.append(Line(scheme, int(world), count, predicted, counted))
    assert format_lines(lines) == quoted
    assert [line.predicted.sent for line in lines] == [
        predict(line.scheme, line.world, line.tasks).sent for line in lines
    ]


@pytest.mark.parametrize("field", ["messages", "sent", "copies"])
@pytest.mark.parametrize("scheme", [DDP, SHARDED, KEPT])
def test_a_disagreement_is_shown_and_fails_the_command(
    scheme: str,
    field: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = predict(scheme, 2, 2)
    other = replace(expected, **{field: getattr(expected, field) + 1})
    good, bad = (Line(scheme, 2, 2, expected, it) for it in (expected, other))
    monkeypatch.setattr(command, "check", lambda _: [good, bad])
    assert command.main(["--check"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("DISAGREE") == 1
    assert "1 of 2 cases agree" in shown
    monkeypatch.setattr(command, "check", lambda _: [good])
    assert command.main(["--check"]) == 0
