"""The tables of the formulas: what a GPU sends and keeps in a step."""

from benchmarks.common.table import lay_out
from benchmarks.scaling.model import (
    GRADIENT,
    HALF,
    NETWORKS,
    ddp_memory,
    ddp_sent,
    fsdp_sent,
    shard_memory,
)

WORLDS = (8, 64, 256, 1024)
TASKS = (0, 2, 4)
"""0: the plain step."""


def format_tables() -> str:
    """Lay out what is sent on 64 GPUs, and the memory on any number."""
    parts = {
        "GB that a GPU sends in a step, 64 GPUs": lay_out(
            [*_head("network"), *_volumes(64)], underline=False
        ),
        "GB of memory at the peak": lay_out(
            [*_head("network", "GPUs"), *_memories()], underline=False
        ),
    }
    return "\n\n".join(f"{title}\n\n{table}" for title, table in parts.items())


def _head(*names: str) -> list[list[str]]:
    schemes = [("DDP", "", ""), ("FSDP2", "", ""), ("FSDP2 kept", "", "")]
    above = [*([""] * len(names)), *(cell for scheme in schemes for cell in scheme)]
    heads = [f"K={tasks}" if tasks else "plain" for tasks in TASKS]
    return [above, [*names, *heads * len(schemes)]]


def _volumes(world: int) -> list[list[str]]:
    rows = []
    for network in NETWORKS:
        gradients = GRADIENT * network.parameters
        gathered = HALF * network.parameters
        counts = [max(tasks, 1) for tasks in TASKS]
        sent = [ddp_sent(world, tasks, gradients) for tasks in counts]
        for keep in (False, True):
            sent += [
                fsdp_sent(world, tasks, gathered, gradients, keep=keep)
                for tasks in counts
            ]
        rows.append([network.name, *(f"{size / 1e9:.1f}" for size in sent)])
    return rows


def _memories() -> list[list[str]]:
    rows = []
    for network in NETWORKS:
        for world in WORLDS:
            kept = [ddp_memory(network, tasks) for tasks in TASKS]
            for keep in (False, True):
                kept += [
                    shard_memory(network, world, tasks, keep=keep) for tasks in TASKS
                ]
            rows.append(
                [network.name, str(world), *(f"{size / 1e9:.0f}" for size in kept)]
            )
    return rows
