"""Functions run as the ranks of a gloo process group, one process each."""

import gc
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist

# Forked from a process that has imported what tests need: a rank starts in no time.
_METHODS = multiprocessing.get_all_start_methods()
METHOD = "forkserver" if "forkserver" in _METHODS else "spawn"
METHOD = os.environ.get("GHOPT_START_METHOD", METHOD)
"""How ranks are started; Windows knows ``spawn`` alone."""

multiprocessing.get_context(METHOD).set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "tests.test_distributed"]
)

needs_signals = pytest.mark.skipif(
    os.name == "nt", reason="Windows knows no signal that kills"
)

SECONDS = 120
"""After which a test gives up: no rank may wait for ever."""


class RankError(Exception):
    """What went wrong on one rank, with its traceback there."""


def run_on_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    environment: dict[str, str] | None = None,
    timeout: float | None = 60,
    may_fail: bool = False,
    method: str = METHOD,
) -> list[Any]:
    """Call a function on every rank, and give what each returned.

    Args:
        world_size: number of ranks.
        function: of a module, called with ``args``.
        args: what can be pickled.
        environment: variables for the ranks, beside those that ``torchrun`` sets.
        timeout: of the default process group, in seconds. With None there is no group:
            frameworks make their own.
        may_fail: give a ``RankError`` in place of a result for a rank that raises or
            ends.
        method: of starting a process.

    Raises:
        RankError: if a rank raises or ends, unless ``may_fail``.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    variables = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
    }
    start: Any = multiprocessing.get_context(method)  # whose type has no Process
    ends, processes = [], []
    for rank in range(world_size):
        mine, theirs = start.Pipe()
        process = start.Process(
            target=_run,
            args=(
                rank,
                variables,
                timedelta(seconds=timeout) if timeout else None,
                function,
                args,
                theirs,
            ),
        )
        process.start()
        theirs.close()
        ends.append(mine)
        processes.append(process)
    outcomes = _hear(ends)
    for end in ends:
        end.close()
    for process in processes:
        process.join(10)
        process.kill()
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, RankError) and not may_fail:
            raise RankError(f"rank {rank}: {outcome}")
    return outcomes


def _hear(ends: Sequence[Connection]) -> list[Any]:
    """Take what every rank has to say, until the last one ends."""
    outcomes: list[Any] = [RankError(f"nothing within {SECONDS} s")] * len(ends)
    until = time.monotonic() + SECONDS
    silent = {end: rank for rank, end in enumerate(ends)}
    while silent and time.monotonic() < until:
        for end in wait(list(silent), timeout=1):
            assert isinstance(end, Connection)
            rank = silent.pop(end)
            try:
                outcomes[rank] = end.recv()
            except EOFError:
                outcomes[rank] = RankError("ended without a word")
    return outcomes


def _run(
    rank: int,
    variables: dict[str, str],
    timeout: timedelta | None,
    function: Callable[..., Any],
    args: Sequence[Any],
    end: Connection,
) -> None:
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    # What was imported before the fork is not looked through for DDP models.
    gc.freeze()
    try:
        if timeout is not None:
            dist.init_process_group("gloo", timeout=timeout)
        outcome = function(*args)
    except BaseException as error:  # noqa: BLE001 -- it is for the test to judge
        told = "".join(traceback.format_exception(error))
        outcome = RankError(f"{type(error).__name__}: {error}\n{told}")
    end.send(outcome)
    # Not to end before the others: the store lives in rank 0, and a test may look at
    # what the others do without an answer.
    with suppress(EOFError, ConnectionResetError):
        end.recv()
    if dist.is_initialized():
        dist.destroy_process_group()
