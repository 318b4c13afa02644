"""The tables of the cost model."""

from collections.abc import Callable, Sequence

from benchmarks.common.table import lay_out
from benchmarks.scaling.model import (
    GRADIENT,
    HALF,
    NETWORKS,
    Cost,
    Hardware,
    Network,
    ddp,
    ddp_sent,
    fsdp,
    fsdp_sent,
)

WORLDS = (8, 64, 256, 1024)
TASKS = (2, 4)

Price = Callable[[Network, int, int], Cost]
"""Cost of a step by network, number of GPUs and number of tasks (0: plain)."""


def format_tables(hardware: Hardware) -> str:
    """Lay out the volume, DDP, and FSDP2 in its two variants."""

    def replicated(network: Network, world: int, tasks: int) -> Cost:
        return ddp(hardware, network, world, tasks)

    def sharded(network: Network, world: int, tasks: int) -> Cost:
        return fsdp(hardware, network, world, tasks)

    def kept(network: Network, world: int, tasks: int) -> Cost:
        return fsdp(hardware, network, world, tasks, keep=True)

    parts = {
        "GB that a GPU sends in a step, 64 GPUs": _volumes(64),
        "DDP": _prices(hardware.memory, replicated),
        "FSDP2, parameters gathered again for each pass": _prices(
            hardware.memory, sharded
        ),
        "FSDP2, parameters kept gathered between the passes": _prices(
            hardware.memory, kept
        ),
    }
    return "\n\n".join(f"{title}\n\n{table}" for title, table in parts.items())


def _volumes(world: int) -> str:
    counts = (1, *TASKS)
    rows: list[tuple[str, ...]] = [
        ("", "DDP", "", "", "FSDP2", "", "", "FSDP2 kept", "", "")
    ]
    rows.append(("network", *(_heading(tasks) for _ in range(3) for tasks in counts)))
    for network in NETWORKS:
        gradients = GRADIENT * network.parameters
        gathered = HALF * network.parameters
        sent = [ddp_sent(world, tasks, gradients) for tasks in counts]
        for keep in (False, True):
            sent += [
                fsdp_sent(world, tasks, gathered, gradients, keep=keep)
                for tasks in counts
            ]
        rows.append((network.name, *(f"{size / 1e9:.1f}" for size in sent)))
    return lay_out(rows, underline=False)


def _prices(memory: float, price: Price) -> str:
    rows: list[tuple[str, ...]] = [
        ("", "", "plain", "", "", *(x for k in TASKS for x in (f"K={k}", "", "", "")))
    ]
    rows.append(
        (
            "network",
            "GPUs",
            *_COLUMNS,
            *(x for _ in TASKS for x in (*_COLUMNS, "ratio")),
        )
    )
    for network in NETWORKS:
        lines: dict[int | str, tuple[str, ...]] = {
            world: _line(
                [price(network, world, tasks) for tasks in (0, *TASKS)], memory
            )
            for world in WORLDS
        }
        if len({*lines.values()}) == 1:  # as little on many GPUs as on few
            lines = {"any": lines[WORLDS[0]]}
        rows += [(network.name, str(world), *line) for world, line in lines.items()]
    return lay_out(rows, underline=False)


_COLUMNS = ("GB", "wait", "ms")


def _line(costs: Sequence[Cost], memory: float) -> tuple[str, ...]:
    """Memory, exposed communication, time, and but for the plain step the ratio."""
    plain = costs[0]
    cells = []
    for cost in costs:
        fits, compared = cost.memory <= memory, plain.memory <= memory
        cells += [
            f"{cost.memory / 1e9:.0f}",
            f"{1e3 * cost.exposed:.0f}" if fits else "-",
            f"{1e3 * cost.time:.0f}" if fits else "no",
            f"{cost.time / plain.time:.2f}" if fits and compared else "-",
        ]
    return (*cells[:3], *cells[4:])


def _heading(tasks: int) -> str:
    return f"K={tasks}" if tasks > 1 else "plain"
