"""All runs of the command, in two worker processes."""

import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch

from benchmarks.common.extra import bench_extra
from benchmarks.uda.data import Task
from benchmarks.uda.methods.rules import RULES
from benchmarks.uda.methods.steps import SOURCE_ONLY, Config
from benchmarks.uda.results import Result
from benchmarks.uda.table import Ratios
from benchmarks.uda.timing import ROUNDS, harmonized, time_ratios
from benchmarks.uda.train import run

WORKERS = 2

ResultT = TypeVar("ResultT", bound=Result)

_task: Task  # of a worker process, set by _start_worker


def run_all(task: Task, configs: Sequence[Config]) -> tuple[list[Result], Ratios]:
    """Train every configuration, two at a time, one thread each.

    Returns:
        The results in the order of ``configs``, and the time ratios by method and rule.
    """
    with bench_extra():
        from tqdm import tqdm
    # One loss alone costs the same with every rule.
    timed = {one.method: one for one in configs if one.method != SOURCE_ONLY}
    with start_pool(task) as pool, tqdm(total=len(timed) + len(configs)) as bar:
        bar.set_description("timing")
        ratios = {}
        for method, config in timed.items():
            # Alone: a run beside it would disturb the clock.
            ratios[method] = pool.submit(_time, config).result()
            bar.update()
        bar.set_description("training")
        # The longest runs, MCD's, first: no process is left with one at the end.
        futures: dict[Config, Future[Result]] = {
            config: pool.submit(run_one, config, run) for config in reversed(configs)
        }
        for future in as_completed(futures.values()):
            future.result()
            bar.update()
    return [futures[config].result() for config in configs], ratios


@contextmanager
def start_pool(task: Task, workers: int = WORKERS) -> Iterator[ProcessPoolExecutor]:
    """Start worker processes that hold the task; drop what is queued on an error."""
    pool = ProcessPoolExecutor(
        workers,
        # A fork would copy torch's threads half.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        # As bytes: tensors as such would pass through shared memory, which is scarce
        # in a container.
        initargs=(pickle.dumps(task),),
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(task: bytes) -> None:
    global _task
    torch.set_num_threads(1)
    _task = pickle.loads(task)


def _time(config: Config) -> dict[str, float]:
    updates = harmonized(*(rule for rule in RULES if rule != "sum"))
    rounds = min(ROUNDS, config.steps)
    _, ratios = time_ratios(_task, config.method, updates, rounds)
    return ratios


def run_one(config: Config, train: Callable[[Config, Task], ResultT]) -> ResultT:
    """Train in a worker process, on its task."""
    return train(config, _task)


def finished(
    task: Task,
    configs: Sequence[Config],
    train: Callable[[Config, Task], ResultT],
    workers: int,
) -> Iterator[ResultT]:
    """Train every configuration, with a bar; yield each run as soon as it is finished."""
    with bench_extra():
        from tqdm import tqdm
    with start_pool(task, workers) as pool, tqdm(total=len(configs)) as bar:
        futures = [pool.submit(run_one, config, train) for config in configs]
        for future in as_completed(futures):
            yield future.result()
            bar.update()
