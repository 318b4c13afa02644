"""What the figures say of features, against slow definitions and by its symmetries."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from torch import Tensor

from benchmarks.uda.data import Task
from benchmarks.uda.methods.features import (
    confusion_matrix,
    embed,
    linear_mmd,
    max_j,
    sample_rows,
    see,
)
from benchmarks.uda.methods.networks import build_networks
from benchmarks.uda.methods.steps import ALL_METHODS


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(classes: int = 4, width: int = 6) -> tuple[Tensor, Tensor]:
    """Classes of different size, as far apart as they are wide."""
    labels = torch.arange(200) % 7 % classes
    return draw(200, width) + draw(classes, width, seed=1)[labels], labels


# Seeing.


@pytest.mark.parametrize("method", ALL_METHODS)
def test_features_and_classes_are_those_of_the_networks_without_dropout(
    task: Task, method: str
) -> None:
    networks = build_networks(method, seed=0)
    state = torch.get_rng_state()
    seen = see(networks, task.test.images)
    assert networks.training
    assert torch.get_rng_state().equal(state)
    networks.eval()
    with torch.no_grad():
        assert seen.predicted.equal(networks(task.test.images).argmax(1))
        assert seen.features.equal(networks.generator(task.test.images))
    assert not seen.features.requires_grad


def test_a_thousand_images_and_more_are_seen_in_order() -> None:
    networks = build_networks("DANN", seed=0)
    images = draw(1003, 1, 16, 16)
    seen = see(networks, images)
    assert len(seen.features) == len(seen.predicted) == 1003
    last = see(networks, images[1000:])
    torch.testing.assert_close(seen.features[1000:], last.features)


def test_the_sample_is_always_the_same_rows_from_everywhere() -> None:
    rows = sample_rows(5000, 100)
    assert rows.equal(sample_rows(5000, 100))
    assert len(set(rows.tolist())) == 100
    assert 2000 < rows.double().mean() < 3000
    assert sorted(sample_rows(7, 100).tolist()) == [*range(7)]


# MMD.


def test_the_linear_mmd_is_that_of_all_pairs() -> None:
    source, target = draw(30, 5), draw(20, 5, seed=1) + 0.5
    pairs = (
        (source @ source.T).mean()
        + (target @ target.T).mean()
        - 2 * (source @ target.T).mean()
    )
    assert linear_mmd(source, target) == pytest.approx(float(pairs), rel=1e-4)
    assert linear_mmd(source, source[torch.randperm(30)]) == pytest.approx(0, abs=1e-12)


# max J(W).


def test_max_j_of_one_feature_is_the_ratio_of_the_variances() -> None:
    # Means -2 and 2 about 0, variance 4; within each class the variance is 1.
    features = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert max_j(features, labels, 2) == pytest.approx(4 / 2, rel=1e-4)
    # A class without images counts in the divisor alone.
    assert max_j(features, labels, 3) == pytest.approx(4 / 3, rel=1e-4)


def test_max_j_is_the_sum_of_the_largest_generalized_eigenvalues() -> None:
    features, labels = clusters()
    rows = features.double().numpy()
    mean = rows.mean(0)
    between, within = np.zeros((6, 6)), np.zeros((6, 6))
    for label in range(4):
        own = rows[labels.numpy() == label]
        apart = own.mean(0) - mean
        between += len(own) * np.outer(apart, apart)
        within += (own - own.mean(0)).T @ (own - own.mean(0))
    values = eigh(between, within, eigvals_only=True)
    assert max_j(features, labels, 4) == pytest.approx(values[-3:].sum() / 4, rel=1e-4)


def test_max_j_knows_no_scale_place_or_base_of_the_features() -> None:
    features, labels = clusters()
    expected = max_j(features, labels, 4)
    turn, _ = torch.linalg.qr(draw(6, 6, seed=2))
    for other in (1e4 * features, 1e-4 * features, features + 50, features @ turn):
        assert max_j(other, labels, 4) == pytest.approx(expected, rel=1e-3)


def test_units_that_never_fire_change_no_max_j() -> None:
    features, labels = clusters()
    dead = torch.cat([features, torch.zeros(200, 3)], 1)
    assert max_j(dead, labels, 4) == pytest.approx(max_j(features, labels, 4), rel=1e-4)


def test_max_j_grows_with_the_distance_of_the_classes() -> None:
    labels = torch.arange(90) % 3
    values = [
        max_j(draw(90, 5) + far * torch.eye(3, 5)[labels], labels, 3)
        for far in (0.0, 1.0, 3.0)
    ]
    assert values == sorted(values)
    assert values[0] < 0.1
    assert values[2] > 1


def test_classes_that_are_points_are_apart_without_an_error() -> None:
    labels = torch.arange(20) % 2
    assert 1e3 < max_j(labels[:, None].float(), labels, 2) < math.inf


def test_features_that_tell_nothing_have_a_max_j_of_0() -> None:
    labels = torch.arange(20) % 4
    assert max_j(torch.ones(20, 3), labels, 4) == 0
    assert max_j(draw(20, 3), torch.zeros(20).long(), 4) == pytest.approx(0, abs=1e-12)


def test_a_diverged_network_has_no_max_j_and_no_picture() -> None:
    features, labels = clusters()
    for broken in (math.nan, math.inf):
        features[3, 2] = broken
        assert math.isnan(max_j(features, labels, 4))
        assert embed(features).isnan().all()


# Confusion and t-SNE.


def test_the_confusion_matrix_counts_labels_by_row() -> None:
    labels, predicted = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0, 1, 2, 0, 0])
    assert confusion_matrix(labels, predicted, 3).tolist() == [
        [1, 1, 0],
        [0, 0, 0],
        [2, 0, 1],
    ]


def test_t_sne_is_the_same_twice_and_keeps_neighbours() -> None:
    labels = torch.arange(60) % 3
    features = draw(60, 8) + 20 * torch.eye(3, 8)[labels]
    found = embed(features)
    assert found.shape == (60, 2)
    assert found.equal(embed(features))
    distances = torch.cdist(found, found).fill_diagonal_(math.inf)
    assert labels[distances.argmin(1)].equal(labels)


def test_t_sne_leaves_the_global_random_states_alone() -> None:
    torch_state, numpy_state = torch.get_rng_state(), str(np.random.get_state())
    embed(draw(510, 60))  # so many that scikit-learn draws at random
    assert torch.get_rng_state().equal(torch_state)
    assert str(np.random.get_state()) == numpy_state
