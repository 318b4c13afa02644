"""Generated images of circles, squares and triangles, annotated in the format of COCO.

An image holds one to four shapes that do not overlap, in front of noise. What is in it is
known only through the annotations, as with a real data set: one function writes them,
another one reads them.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from random import Random
from typing import NamedTuple, TypeAlias, TypedDict

import torch
from torch import Tensor

from benchmarks.mtl.problem import generator

SIDE = 48
CATEGORIES = ("circle", "square", "triangle")
MOST = 4
SMALLEST, LARGEST = 8, 20
FAINTEST = 0.3
NOISE = 0.15
COUNT = 5000
TRIES = 20


class Shape(NamedTuple):
    """One shape; its box is as tight as whole pixels allow.

    Attributes:
        category: index into ``CATEGORIES``.
        left: of the box, in pixels.
        top: of the box.
        size: width and height of the box.
        level: grey, in front of 0.
    """

    category: int
    left: int
    top: int
    size: int
    level: float


class Labels(NamedTuple):
    """What is in one image.

    Attributes:
        boxes: left, top, width and height, float64 ``[n, 4]``.
        categories: indices into the names of the categories, int64 ``[n]``.
    """

    boxes: Tensor
    categories: Tensor


class CocoImage(TypedDict):
    """An image of a file in COCO's format."""

    id: int
    width: int
    height: int
    file_name: str


class CocoAnnotation(TypedDict):
    """An object in an image, in COCO's format."""

    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int


class CocoCategory(TypedDict):
    """A category of a file in COCO's format."""

    id: int
    name: str
    supercategory: str


class Coco(TypedDict):
    """A file of annotations in COCO's format (Lin et al., 2014), for detection."""

    images: list[CocoImage]
    annotations: list[CocoAnnotation]
    categories: list[CocoCategory]


Scene: TypeAlias = tuple[Shape, ...]


@cache
def shapes() -> tuple[Tensor, Coco]:
    """Draw the data set: images ``[5000, 1, 48, 48]`` and their annotations.

    It is the same for all seeds.
    """
    # Python's generator: some hundred thousand single numbers, twenty times as fast.
    draws = Random(0)
    scenes = [draw_scene(draws) for _ in range(COUNT)]
    images = torch.stack([render(scene) for scene in scenes])
    noise = torch.randn(images.shape, generator=generator(0))
    return images + NOISE * noise, write_coco(scenes)


def draw_scene(draws: Random) -> Scene:
    """Draw one to four shapes whose boxes do not overlap.

    Where there is no room left for one, it is left out.
    """
    scene: list[Shape] = []
    for _ in range(draws.randint(1, MOST)):
        category = draws.randrange(len(CATEGORIES))
        size = draws.randint(SMALLEST, LARGEST)
        level = draws.uniform(FAINTEST, 1)
        for _ in range(TRIES):
            left, top = (draws.randint(0, SIDE - size) for _ in "xy")
            shape = Shape(category, left, top, size, level)
            if not any(_overlap(shape, other) for other in scene):
                scene.append(shape)
                break
    return tuple(scene)


@cache
def mask(category: int, size: int) -> Tensor:
    """Pixels of a shape in its box, bool ``[size, size]``; it touches all four sides."""
    steps = torch.arange(size)
    across = steps + 0.5 - size / 2
    match CATEGORIES[category]:
        case "circle":
            return across.square()[:, None] + across.square() <= (size / 2) ** 2
        case "triangle":
            return across.abs() <= (steps[:, None] + 1) / 2
        case _:
            return torch.ones(size, size, dtype=torch.bool)


def render(scene: Iterable[Shape]) -> Tensor:
    """Draw shapes in front of 0, without noise, ``[1, 48, 48]``."""
    image = torch.zeros(1, SIDE, SIDE)
    for shape in scene:
        rows = slice(shape.top, shape.top + shape.size)
        columns = slice(shape.left, shape.left + shape.size)
        image[0, rows, columns][mask(shape.category, shape.size)] = shape.level
    return image


def write_coco(scenes: Sequence[Scene]) -> Coco:
    """Annotate images in the format of COCO: ids from 1, areas in pixels of the shape."""
    annotated = [
        (number, shape) for number, scene in enumerate(scenes, 1) for shape in scene
    ]
    return {
        "images": [
            {"id": n, "width": SIDE, "height": SIDE, "file_name": f"{n:06}.png"}
            for n in range(1, len(scenes) + 1)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": shape.category + 1,
                "bbox": [shape.left, shape.top, shape.size, shape.size],
                "area": int(mask(shape.category, shape.size).sum()),
                "iscrowd": 0,
            }
            for number, (image, shape) in enumerate(annotated, 1)
        ],
        "categories": [
            {"id": number, "name": name, "supercategory": "shape"}
            for number, name in enumerate(CATEGORIES, 1)
        ],
    }


def read_coco(content: Coco) -> list[Labels]:
    """Read annotations in the format of COCO, in the order of the images.

    Categories become indices in the order of their ids, which may have gaps, as in COCO
    itself. Crowds are left out: their boxes are of no single object.

    Raises:
        ValueError: if an annotation names no image or category of the file.
    """
    indices = {
        id_: index
        for index, id_ in enumerate(sorted(one["id"] for one in content["categories"]))
    }
    found: dict[int, list[CocoAnnotation]] = {
        one["id"]: [] for one in content["images"]
    }
    for one in content["annotations"]:
        if one["image_id"] not in found:
            raise ValueError(f"Invalid image_id value: {one['image_id']}")
        if one["category_id"] not in indices:
            raise ValueError(f"Invalid category_id value: {one['category_id']}")
        if not one["iscrowd"]:
            found[one["image_id"]].append(one)
    return [
        Labels(
            torch.tensor([one["bbox"] for one in ones], dtype=torch.float64).view(
                -1, 4
            ),
            torch.tensor([indices[one["category_id"]] for one in ones]).long(),
        )
        for ones in found.values()
    ]


def _overlap(first: Shape, second: Shape) -> bool:
    return (
        first.left < second.left + second.size
        and second.left < first.left + first.size
        and first.top < second.top + second.size
        and second.top < first.top + first.size
    )
