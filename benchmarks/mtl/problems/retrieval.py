"""Image-text retrieval: from images to captions against from captions to images.

Contrastive training as in CLIP (Radford et al., 2021), on the generated shapes: their
captions are made of the annotations. All parameters are shared.
"""

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.mtl.problem import Batch, Metric, Problem, Training, generator
from benchmarks.mtl.problems.networks import make_layer
from benchmarks.mtl.problems.shapes import (
    CATEGORIES,
    MOST,
    SIDE,
    Labels,
    read_coco,
    shapes,
)

SIZES = {"small": 0, "medium": 12, "large": 16}  # from how many pixels on
# Index 0 is where there is no word.
WORDS = ("", "a", *SIZES, *CATEGORIES, "above", "left", "right", "of")
LONGEST = 3 * MOST + 2 * (MOST - 1)
EMBEDDING, FEATURES = 32, 48
WIDTH = 32
BATCH = 64
TESTS = 500
RATE = 3e-3
SCALE = 20.0  # of cosines, before training
NUMBERS = (1, 5, 10, 50, 100)  # the columns of the paper's Table 8


class Pairs(NamedTuple):
    """Images and their captions.

    Attributes:
        images: ``[n, 1, 48, 48]``.
        words: indices into ``WORDS``, int64 ``[n, 18]``.
    """

    images: Tensor
    words: Tensor


class TwoEncoders(nn.Module):
    """An encoder of images, one of captions, and the scale of their cosines."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.AvgPool2d(2),  # half the noise, a quarter of the pixels to pay for
            *make_layer(1, WIDTH // 2, 5, stride=2),
            *make_layer(WIDTH // 2, WIDTH, 3),
            *make_layer(WIDTH, WIDTH, 3, stride=2),
            nn.Flatten(),
            nn.Linear(WIDTH * (SIDE // 8) ** 2, FEATURES),
        )
        self.embedding = nn.Embedding(len(WORDS), EMBEDDING, padding_idx=0)
        self.words = nn.GRU(EMBEDDING, FEATURES, batch_first=True)
        self.log_scale = nn.Parameter(torch.tensor(SCALE).log())

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        """Return scaled cosines ``[B, C]`` of images with captions ``[C, length]``."""
        _, states = self.words(self.embedding(words))
        texts = F.normalize(states[0], dim=1)
        return self.log_scale.exp() * F.normalize(self.image(images), dim=1) @ texts.T


def start(seed: int) -> Training:
    """Give the training of a seed; sets the global random state."""
    train, exam = load()
    torch.manual_seed(seed)
    model = TwoEncoders()

    def losses(batch: Batch) -> dict[str, Tensor]:
        images, words = batch
        return contrastive_losses(model(images, words), words)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        cosines = model(*exam)
        return {
            f"{way} R@{number}": recall(matrix, number)
            for way, matrix in (("to text", cosines), ("to image", cosines.T))
            for number in NUMBERS
        }

    return Training(
        model,
        torch.optim.Adam(model.parameters(), lr=RATE),
        list(model.parameters()),
        _batches(train, seed),
        losses,
        evaluate,
    )


PROBLEM = Problem(
    "retrieval",
    "images and captions of shapes, each finds the other",
    ("image to text", "text to image"),
    tuple(
        Metric(f"{way} R@{number}", headline=number == 1)
        for way in ("to text", "to image")
        for number in NUMBERS
    ),
    steps=300,
    start=start,
)


@cache
def load() -> tuple[Pairs, Pairs]:
    """Caption the shapes; give the pairs to train on, and the exam.

    The exam is 500 different captions, with the first image of each. None of them
    describes an image that is trained on.
    """
    images, annotations = shapes()
    captions = [caption(labels) for labels in read_coco(annotations)]
    first: dict[str, int] = {}
    for index, text in enumerate(captions):
        first.setdefault(text, index)
    asked = dict(list(first.items())[-TESTS:])
    known = [index for index, text in enumerate(captions) if text not in asked]
    words = torch.stack([encode(text) for text in captions])
    exam = list(asked.values())
    return Pairs(images[known], words[known]), Pairs(images[exam], words[exam])


def caption(labels: Labels) -> str:
    """Say what is in an image, from top to bottom.

    Each shape is placed relative to the next: above it, or, if it is further away along
    the other axis, left or right of it. For example "a large circle above a small square
    left of a small circle".

    Args:
        labels: of at least one shape.
    """
    middles = labels.boxes[:, :2] + labels.boxes[:, 2:] / 2
    order = sorted(range(len(middles)), key=lambda index: _top_down(middles[index]))
    text = _noun(labels, order[0])
    for first, second in pairwise(order):
        across, down = (middles[second] - middles[first]).tolist()
        beside = "left of" if across > 0 else "right of"
        relation = "above" if down >= abs(across) else beside
        text += f" {relation} {_noun(labels, second)}"
    return text


def encode(text: str) -> Tensor:
    """Make indices of words, int64 ``[18]``.

    Zeros come before the words, so that the last state of a GRU is that after the last
    word.

    Raises:
        ValueError: if a word is unknown.
    """
    indices = [WORDS.index(word) for word in text.split()]
    return torch.tensor([0] * (LONGEST - len(indices)) + indices)


def contrastive_losses(cosines: Tensor, words: Tensor) -> dict[str, Tensor]:
    """InfoNCE of both tasks, where another image's equal caption is no wrong answer.

    Args:
        cosines: scaled, ``[B, B]``, of images (rows) with captions; pairs on the diagonal.
        words: the captions, ``[B, length]``.
    """
    own = torch.arange(len(cosines))
    equal = (words[:, None] == words).all(2) & (own[:, None] != own)
    cosines = cosines.masked_fill(equal, -torch.inf)
    return {
        "image to text": F.cross_entropy(cosines, own),
        "text to image": F.cross_entropy(cosines.T, own),
    }


def recall(cosines: Tensor, number: int) -> float:
    """Share of the rows whose own column is among the largest, in percent.

    Args:
        cosines: ``[n, n]``, pairs on the diagonal. Of equals, the own comes last.
        number: how many of the largest.
    """
    rank = (cosines >= cosines.diagonal()[:, None]).sum(1)
    return 100 * float((rank <= number).double().mean())


def _noun(labels: Labels, index: int) -> str:
    width = float(labels.boxes[index, 2])
    size = [name for name, least in SIZES.items() if width >= least][-1]
    return f"a {size} {CATEGORIES[int(labels.categories[index])]}"


def _top_down(middle: Tensor) -> tuple[float, float]:
    across, down = middle.tolist()
    return down, across


def _batches(train: Pairs, seed: int) -> Iterator[Batch]:
    draws = generator(seed, 1)
    while True:
        rows = torch.randint(len(train.words), (BATCH,), generator=draws)
        yield train.images[rows], train.words[rows]
