"""The images of a task, as batches: read when needed, resized, cropped, mirrored."""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.uda.data import Batch, shuffled_rows
from benchmarks.uda.data.image_lists import Domain, Task
from ghopt.extras import from_extra

RESIZED, CROP = 256, 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Draw: TypeAlias = tuple[int, int | None]
"""The row of an image, and the seed of its random view; None for its center."""


def batches(
    task: Task, size: int, steps: int, seed: int, workers: int = 0
) -> Iterator[Batch]:
    """Yield ``steps`` batches of ``size`` images of each domain: see :func:`random_view`.

    The images are uint8 ``[size, 3, 224, 224]``, for :func:`normalize`. They depend on
    the task, ``size`` and ``seed`` alone, not on the global random state and not on
    ``workers``, the number of processes that read them for each domain. Every domain
    is reshuffled when fewer than ``size`` unseen images are left.

    Raises:
        ValueError: if a domain has fewer than ``size`` images.
    """
    sources, targets = (
        # Of their own: one generator for both would be read in an order that depends
        # on how far the workers are ahead.
        _load(domain, _draws(len(domain.paths), size, steps, 2 * seed + place), workers)
        for place, domain in enumerate((task.source, task.target))
    )
    for (images, labels), (others, _) in zip(sources, targets, strict=True):
        yield Batch(images, labels, others)


def ordered_batches(
    domain: Domain, size: int, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all images in order, at most ``size`` at a time, and their labels.

    They are uint8 ``[b, 3, 224, 224]`` and int64 ``[b]``: see :func:`center_view`.
    """
    count = len(domain.paths)
    draws: Iterator[list[Draw]] = (
        [(row, None) for row in range(start, min(start + size, count))]
        for start in range(0, count, size)
    )
    yield from _load(domain, draws, workers)


def read_image(path: str) -> Tensor:
    """Read an image of any mode as red, green and blue, uint8 ``[3, height, width]``.

    As in the published loaders, what is transparent shows the color beneath.

    Raises:
        OSError: if it cannot be read; names it.
    """
    with from_extra("images"):
        from PIL import Image
    try:
        with Image.open(path) as image:
            # A palette with several levels of transparency: Pillow warns otherwise.
            whole = image.convert("RGBA") if "transparency" in image.info else image
            colors = whole.convert("RGB")
    except OSError as error:
        raise OSError(f"{path} cannot be read as an image: {error}") from error
    pixels = torch.frombuffer(bytearray(colors.tobytes()), dtype=torch.uint8)
    return pixels.view(colors.height, colors.width, 3).permute(2, 0, 1)


def random_view(image: Tensor, seed: int) -> Tensor:
    """Resize to 256x256, crop 224x224 anywhere, mirror every other: ``[3, 224, 224]``.

    ``seed`` alone decides where and which.
    """
    generator = torch.Generator().manual_seed(seed)
    places = RESIZED - CROP + 1
    top, left = torch.randint(places, (2,), generator=generator).tolist()
    mirrored = torch.rand((), generator=generator) < 0.5
    view = _resize(image)[:, top : top + CROP, left : left + CROP]
    return view.flip(2) if mirrored else view


def center_view(image: Tensor) -> Tensor:
    """Resize to 256x256 and crop the middle, ``[3, 224, 224]``."""
    edge = (RESIZED - CROP) // 2
    return _resize(image)[:, edge : edge + CROP, edge : edge + CROP]


def normalize(images: Tensor) -> Tensor:
    """Shift and scale uint8 ``[B, 3, h, w]`` to float32, as for models of ImageNet."""
    mean, deviation = (
        torch.tensor(numbers, device=images.device).view(3, 1, 1)
        for numbers in (MEAN, DEVIATION)
    )
    return (images / 255 - mean) / deviation


class _Views(Dataset[tuple[Tensor, int]]):
    """The views of a domain's images, read when they are asked for."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        row, seed = draw
        image = read_image(self._domain.paths[row])
        view = center_view(image) if seed is None else random_view(image, seed)
        return view, self._domain.labels[row]


def _load(
    domain: Domain, draws: Iterable[list[Draw]], workers: int
) -> DataLoader[tuple[Tensor, int]]:
    return DataLoader(
        _Views(domain),
        batch_sampler=draws,
        num_workers=workers,
        # A fork would copy torch's threads half.
        multiprocessing_context="spawn" if workers else None,
        # Or it would draw a number from the global state, and dropout another one.
        generator=torch.Generator(),
    )


def _draws(count: int, size: int, steps: int, seed: int) -> Iterator[list[Draw]]:
    generator = torch.Generator().manual_seed(seed)
    rows = shuffled_rows(count, size, generator)
    for _ in range(steps):
        chosen = next(rows).tolist()
        seeds = torch.randint(2**62, (size,), generator=generator).tolist()
        yield list(zip(chosen, seeds, strict=True))


def _resize(image: Tensor) -> Tensor:
    # Both sides to one length, as CDAN and SSRT do, whatever that does to the shapes.
    size = (RESIZED, RESIZED)
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
