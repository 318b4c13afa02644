"""Count what real steps send and keep, on gloo ranks, and hold it against the model.

Every rank counts for itself; they do the same, so rank 0 is asked. Messages and bytes
are those that torch hands to the collectives: what gloo or NCCL make of them is theirs.
"""

import json
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from benchmarks.common.table import lay_out
from benchmarks.common.watch import Watch
from benchmarks.scaling.model import (
    ddp_control,
    ddp_copies,
    ddp_messages,
    ddp_sent,
    fsdp_control,
    fsdp_memory,
    fsdp_messages,
    fsdp_sent,
    reduced,
    scattered,
)
from ghopt import HarmonizedOptimizer

TASKS = (2, 3, 4)
DDP, VIEWS, SHARDED, KEPT = "DDP", "DDP, bucket views", "FSDP2", "FSDP2, kept"


@dataclass(frozen=True)
class Stack:
    """Equal layers, each a weight ``[width, width]`` and a bias ``[width]``.

    Attributes:
        layers: their number.
        width: of all layers.
    """

    layers: int
    width: int

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return self.layers * (self.width * self.width + self.width)


# Under DDP weights so large that ghopt sends them alone and in place, as those of real
# networks; under FSDP2 so many layers that one of them is little beside the gradients,
# and none so small that its shards are packed, into another copy, for the Gramian.
STACKS = {DDP: Stack(2, 1024), VIEWS: Stack(2, 1024)}
STACKS |= {SHARDED: Stack(16, 320), KEPT: Stack(16, 320)}
BATCH = 2  # so few that activations do not count
# float64, since the Gramian of narrower gradients takes scratch memory, which is small
# beside the gradients of a real network but not of these. Under FSDP2 float32 when
# gathered: half of it, as bfloat16 is of float32 in the tables.
WIDE, NARROW = 8, 4


@dataclass(frozen=True)
class Counts:
    """What one step takes on one rank.

    Attributes:
        messages: collectives.
        sent: bytes that the rank sends for them, on a ring.
        copies: memory at its peak beside the parameters that the rank holds, in copies
            of what it holds of the gradients of one task.
    """

    messages: int
    sent: int
    copies: float


@dataclass(frozen=True)
class Line:
    """Prediction and count of one case; 0 tasks: the plain step."""

    scheme: str
    world: int
    tasks: int
    predicted: Counts
    counted: Counts

    @property
    def agrees(self) -> bool:
        """Equal messages and bytes, and as much memory within the tolerance.

        That is 0.05 copies, and under FSDP2 what one block takes when gathered: when
        exactly torch frees one varies from run to run.
        """
        one, other = self.predicted, self.counted
        same = (one.messages, one.sent) == (other.messages, other.sent)
        tolerance = 0.05
        if self.scheme in (SHARDED, KEPT):
            layers = STACKS[self.scheme].layers
            tolerance = (WIDE + NARROW) / WIDE / layers * self.world
        return same and abs(one.copies - other.copies) <= tolerance


def check(worlds: Sequence[int], tasks: Sequence[int] = TASKS) -> list[Line]:
    """Run every scheme with every number of tasks, and plain, on gloo ranks.

    Args:
        worlds: numbers of ranks. Takes half a minute or more for each.
        tasks: numbers of tasks.
    """
    cases = [(scheme, count) for scheme in STACKS for count in (0, *tasks)]
    return [
        Line(scheme, world, count, predict(scheme, world, count), counted)
        for world in worlds
        for (scheme, count), counted in zip(
            cases, _count_all(world, cases), strict=True
        )
    ]


def predict(scheme: str, world: int, tasks: int) -> Counts:
    """Say what the model expects of the network of this check."""
    stack, runs = STACKS[scheme], max(tasks, 1)
    gradients, gathered = WIDE * stack.parameters, NARROW * stack.parameters
    if scheme in (DDP, VIEWS):
        copies: float = ddp_copies(tasks, bucket_view=scheme == VIEWS)
        if scheme == VIEWS and not tasks:
            copies += 1 / stack.layers  # one gradient on its way to its bucket
        control = ddp_control(world, tasks, 2 * stack.layers)
        return Counts(
            messages=ddp_messages(tasks, stack.layers, packed=1) if tasks else 1,
            sent=round(ddp_sent(world, runs, gradients) + control),
            copies=copies,
        )
    keep = scheme == KEPT
    sent = fsdp_sent(world, runs, gathered, gradients, keep=keep)
    memory = fsdp_memory(world, runs, gathered, gradients, stack.layers, keep=keep)
    return Counts(
        messages=fsdp_messages(tasks, stack.layers, keep=keep),
        sent=round(sent + fsdp_control(world, tasks)),
        copies=memory / (gradients / world),
    )


def format_lines(lines: Sequence[Line]) -> str:
    """Lay out predictions (p) and counts (c) side by side."""
    rows = [
        ["", "", "", "messages", "", "bytes sent", "", "copies", "", ""],
        ["", "ranks", "tasks", *("p", "c") * 3, ""],
    ]
    for line in lines:
        both = (line.predicted, line.counted)
        rows.append(
            [
                line.scheme,
                str(line.world),
                str(line.tasks or "plain"),
                *(str(one.messages) for one in both),
                *(str(one.sent) for one in both),
                *(f"{one.copies:.2f}" for one in both),
                "" if line.agrees else "DISAGREE",
            ]
        )
    return lay_out(rows, underline=False)


def _count_all(world: int, cases: Sequence[tuple[str, int]]) -> list[Counts]:
    """Run every case on ``world`` processes."""
    with tempfile.TemporaryDirectory() as folder:
        # Not fork: it would copy torch's threads half.
        spawn(_rank, (world, folder, cases), nprocs=world)  # type: ignore[no-untyped-call]  # torch's
        found = json.loads(Path(folder, "counts.json").read_text(encoding="utf-8"))
    return [Counts(**counts) for counts in found]


def _rank(rank: int, world: int, folder: str, cases: Sequence[tuple[str, int]]) -> None:
    """Be one rank of all cases; the first one writes down what it counted."""
    torch.set_num_threads(1)
    # Needs no free port. The address of a file would differ on Windows.
    file = str(Path(folder, "rendezvous"))
    store = dist.FileStore(file, world)  # type: ignore[attr-defined]  # not in its __all__
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        counts = [_count(scheme, tasks) for scheme, tasks in cases]
    finally:
        dist.destroy_process_group()
    if rank == 0:
        found = json.dumps([asdict(one) for one in counts])
        Path(folder, "counts.json").write_text(found, encoding="utf-8")


def _count(scheme: str, tasks: int) -> Counts:
    """Train three steps and count the third: DDP orders its buckets in the first."""
    stack = STACKS[scheme]
    with _Watch() as watch:
        model = _model(scheme, stack)
        optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=1e-3))
        inputs = torch.randn(BATCH, stack.width, dtype=torch.float64)
        for step in range(3):
            watch.counting = step == 2
            _step(scheme, model, optimizer, inputs, tasks)
    held = WIDE * stack.parameters
    if isinstance(model, FSDPModule):
        held //= dist.get_world_size()
    return Counts(watch.messages, round(watch.sent), watch.peak / held - 1)


def _model(scheme: str, stack: Stack) -> nn.Module:
    """Build a stack and spread it over the ranks."""
    torch.manual_seed(0)
    width = stack.width
    layers = [nn.Linear(width, width, dtype=torch.float64) for _ in range(stack.layers)]
    model = nn.Sequential(*layers)
    if scheme in (DDP, VIEWS):
        # One bucket, so that the plain step sends one message.
        return DistributedDataParallel(
            model, bucket_cap_mb=1000, gradient_as_bucket_view=scheme == VIEWS
        )
    policy = MixedPrecisionPolicy(torch.float32, torch.float64)
    for layer in layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model


def _step(
    scheme: str,
    model: nn.Module,
    optimizer: HarmonizedOptimizer,
    inputs: Tensor,
    tasks: int,
) -> None:
    """Take one step; for 0 tasks the plain one, on the sum of two losses."""

    def keep(loss: Tensor, *, retain_graph: bool) -> None:
        # The graph is retained for another pass, which will need the parameters.
        if isinstance(model, FSDPModule):
            model.set_reshard_after_backward(not retain_graph)
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's

    optimizer.zero_grad()
    ddp = model if isinstance(model, DistributedDataParallel) else None
    with ddp.no_sync() if ddp and tasks else nullcontext():
        losses = model(inputs)[:, : tasks or 2].square().mean(0)
        if tasks:
            backward_fn = keep if scheme == KEPT else None
            optimizer.backward(losses, backward_fn=backward_fn, sync_group=ddp)
        else:
            losses.sum().backward()
    (optimizer if tasks else optimizer.base_optimizer).step()


class _Watch(Watch):  # type: ignore[no-untyped-call]  # torch's
    """Counts collectives, too, and memory also of what torch itself begins.

    Not by the profiler, which loses what gloo's threads free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counting = False
        self.messages, self.sent = 0, 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # then it is split first, and its shard comes here
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.counting and func.namespace == "c10d":
            self.messages += 1
            self.sent += _sent(func.overloadpacket.__name__, args)
        return result


def _sent(name: str, args: Sequence[Any]) -> float:
    """Bytes that a rank sends for a collective, by the size of its larger side."""
    world = dist.get_world_size()
    match name, args:
        case "allreduce_", ([tensor], *_):
            return reduced(world, tensor.nbytes)
        case "broadcast_", ([tensor], *_):
            return float(tensor.nbytes)
        case "_allgather_base_", (whole, *_):
            return scattered(world, whole.nbytes)
        case "_reduce_scatter_base_", (_, whole, *_):
            return scattered(world, whole.nbytes)
    raise ValueError(f"the model knows no collective {name}")
