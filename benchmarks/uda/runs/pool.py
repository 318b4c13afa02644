"""Worker processes that train and time, one thread each."""

import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch

from benchmarks.uda.data import Task
from benchmarks.uda.methods.rules import RULES
from benchmarks.uda.methods.steps import SOURCE_ONLY, Config
from benchmarks.uda.runs.cost import ROUNDS, time_ratios, updates_of
from ghopt.extras import from_extra

WORKERS = 2

ResultT = TypeVar("ResultT")

_task: Task  # of a worker process, set by _start_worker


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


def run_one(config: Config, train: Callable[[Config, Task], ResultT]) -> ResultT:
    """Train in a worker process, on its task."""
    return train(config, _task)


def finished(
    pool: ProcessPoolExecutor,
    configs: Sequence[Config],
    train: Callable[[Config, Task], ResultT],
) -> Iterator[ResultT]:
    """Train every configuration, with a bar; yield each run as soon as it is finished."""
    with from_extra("bench"):
        from tqdm import tqdm
    with tqdm(total=len(configs), desc="training") as bar:
        futures = [pool.submit(run_one, config, train) for config in configs]
        for future in as_completed(futures):
            yield future.result()
            bar.update()


def timed(
    pool: ProcessPoolExecutor, configs: Sequence[Config]
) -> dict[str, dict[str, float]]:
    """Time a step of the rules of the main job, with a bar: ratios by method and rule."""
    with from_extra("bench"):
        from tqdm import tqdm
    # One loss alone costs the same with every rule.
    chosen = {one.method: one for one in configs if one.method != SOURCE_ONLY}
    return {
        # Alone: a run beside it would disturb the clock.
        method: pool.submit(_time, config).result()
        for method, config in tqdm(chosen.items(), desc="timing")
    }


def _time(config: Config) -> dict[str, float]:
    updates = updates_of(*(rule for rule in RULES if rule != "sum"))
    rounds = min(ROUNDS, config.steps)
    _, ratios = time_ratios(_task, config.method, updates, rounds)
    return ratios
