"""Nothing assumes Linux: encodings, ends of lines, and how processes start."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.testing import assert_close

from ghopt import HarmonizedOptimizer
from tests import models
from tests.ranks import run_on_ranks

HERE = Path(__file__).parents[1]
ROOMS = ("ghopt", "benchmarks", "examples", "tests", "docs")


def calls(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the names of the methods that a file calls, with the arguments as written."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            arguments = (ast.unparse(one) for one in (*node.args, *node.keywords))
            yield ast.unparse(node.func).rpartition(".")[2], ", ".join(arguments)


@pytest.mark.parametrize("room", ROOMS)
def test_text_is_read_and_written_as_utf_8(room: str) -> None:
    seen = 0
    for path in HERE.glob(f"{room}/**/*.py"):
        for name, arguments in calls(path):
            is_text = name in ("read_text", "write_text") or (
                name == "open" and re.search(r"'[rwa]\+?'", arguments)
            )
            if is_text:
                seen += 1
                place = path.relative_to(HERE)
                assert re.search("utf-8", arguments), f"{place}: {name}({arguments})"
    assert seen


def test_our_files_end_their_lines_alike_on_every_platform() -> None:
    rules = (HERE / ".gitattributes").read_text(encoding="utf-8")
    assert "* text=auto eol=lf\n" in rules
    texts = [*HERE.glob("*.md"), *HERE.glob("*.cfg"), *HERE.glob("ghopt/**/*.py")]
    texts += HERE.glob("benchmarks/**/*.jsonl")
    assert len(texts) > 30
    for path in texts:
        assert b"\r" not in path.read_bytes(), path


# Processes


def train_alone() -> list[Tensor]:
    """Train two steps on whole batches."""
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    for step in range(2):
        optimizer.step(losses=model(*models.batch(2, step)))
    return [parameter.detach() for parameter in model.parameters()]


def train_on_a_rank() -> list[Tensor]:
    """Train two steps on the rank's half of the batches."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = models.make(models.heads_on_a_trunk, 2)
    ddp = DistributedDataParallel(model)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    for step in range(2):
        inputs, targets = models.batch(2, step)
        with ddp.no_sync():
            losses = ddp(inputs.chunk(size)[rank], targets.chunk(size, dim=1)[rank])
            optimizer.zero_grad()
            optimizer.backward(losses, sync_group=ddp)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


# The others start ranks as the platform does best; GHOPT_START_METHOD=spawn changes that.
def test_ranks_that_are_spawned_train_as_one_process_does() -> None:
    for found in run_on_ranks(2, train_on_a_rank, method="spawn"):
        assert_close(found, train_alone(), rtol=0, atol=1e-12)


def test_workers_of_the_benchmarks_are_spawned_and_never_forked() -> None:
    """A fork copies torch's threads half, and Windows knows none."""
    starters = {
        "ProcessPoolExecutor": "context",
        "DataLoader": "'spawn'",
        "get_context": "'spawn'",
        "Process": "nothing that starts by itself",
        "Pool": "nothing that starts by itself",
    }
    seen = set()
    for path in HERE.glob("benchmarks/**/*.py"):
        for name, arguments in calls(path):
            if name in starters:
                seen.add(name)
                assert starters[name] in arguments, f"{path}: {name}({arguments})"
    assert seen == {"ProcessPoolExecutor", "DataLoader", "get_context"}
