"""The problems: data, attacks, equations and losses are what they are called."""

import math
from collections.abc import Callable
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.digits import Split
from benchmarks.mtl.problem import Problem, Training, accuracy, generator
from benchmarks.mtl.problems import (
    PROBLEMS,
    adversarial,
    cells,
    multimnist,
    pinn,
    vae,
)
from benchmarks.mtl.problems.digits import digits
from benchmarks.mtl.problems.networks import lenet
from benchmarks.mtl.train import harmonized
from ghopt import HarmonizedOptimizer, Recorder, gh
from ghopt.report import judge


def use_small_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits that are noisy copies of ten images: reading the real file takes seconds."""
    draws = generator(0)
    drawn = torch.rand(10, 1, 16, 16, generator=draws)
    labels = torch.arange(100) % 10
    images = (drawn[labels] + torch.rand(100, 1, 16, 16, generator=draws) / 5) / 1.2
    for module in (adversarial, multimnist, vae):
        monkeypatch.setattr(module, "digits", lambda: (Split(images, labels),) * 2)
        monkeypatch.setattr(module, "TESTS", 8)


@pytest.fixture(autouse=True)
def small_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_digits(monkeypatch)


@pytest.fixture(params=[*PROBLEMS.values()], ids=[*PROBLEMS])
def problem(request: pytest.FixtureRequest) -> Problem:
    found: Problem = request.param
    return found


def first_steps(training: Training) -> list[Tensor]:
    """Initial weights, two batches and their losses."""
    batches = list(islice(training.batches, 2))
    losses = [loss for batch in batches for loss in training.losses(batch).values()]
    tensors = [*training.model.parameters(), *(t for b in batches for t in b), *losses]
    return [tensor.detach().clone() for tensor in tensors]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_a_seed_alone_decides_weights_batches_and_losses(problem: Problem) -> None:
    one = first_steps(problem.start(1))
    torch.rand(1)
    assert same(one, first_steps(problem.start(1)))
    assert not same(one, first_steps(problem.start(2)))


def test_a_problem_gives_the_tasks_and_metrics_that_it_names(problem: Problem) -> None:
    training = problem.start(0)
    losses = training.losses(next(training.batches))
    assert tuple(losses) == problem.tasks
    assert {*training.evaluate()} == {metric.name for metric in problem.metrics}
    assert problem.metrics[0].headline
    held = {*training.model.parameters()}
    assert {
        p for group in training.optimizer.param_groups for p in group["params"]
    } == held
    assert {*training.shared} <= held


def test_every_task_reaches_the_first_shared_parameter_and_heads_of_its_own(
    problem: Problem,
) -> None:
    training = problem.start(0)
    heads = [p for p in training.model.parameters() if p not in {*training.shared}]
    losses = training.losses(next(training.batches))
    patterns = set()
    for loss in losses.values():
        wanted = [training.shared[0], *heads]
        found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        assert found[0] is not None
        patterns.add(tuple(gradient is not None for gradient in found[1:]))
    assert len(patterns) == (len(losses) if heads else 1)


def test_an_evaluation_changes_neither_model_nor_the_random_state(
    problem: Problem,
) -> None:
    training = problem.start(0)
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    state = torch.get_rng_state()
    assert training.evaluate() == training.evaluate()
    assert torch.get_rng_state().equal(state)
    assert same(before, [*training.model.parameters()])
    assert all(parameter.grad is None for parameter in training.model.parameters())


def test_digits_are_split_with_mixed_classes_and_none_on_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = torch.rand(5000, 1, 16, 16, generator=generator(0)) * 2 - 1
    images[:, 0, 0, 0], images[:, 0, 0, 1] = -1, 1
    labels = torch.arange(10).repeat_interleave(500)  # sorted, as in the file
    images[:, 0, 1, 1] = labels / 5 - 1
    monkeypatch.setattr(
        "benchmarks.mtl.problems.digits.mnist5k", lambda _: Split(images, labels)
    )
    train, test = digits.__wrapped__()
    assert train.images.shape == (4000, 1, 16, 16)
    assert test.images.shape == (1000, 1, 16, 16)
    for split in (train, test):
        assert split.images.min() == 0
        assert split.images.max() == 1
        torch.testing.assert_close(split.images[:, 0, 1, 1], split.labels / 10)
        assert split.labels.bincount().min() > 0.07 * len(split.labels)
    known = {image.numpy().tobytes() for image in train.images}
    assert not known & {image.numpy().tobytes() for image in test.images}


def test_an_accuracy_is_in_percent() -> None:
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert accuracy(logits, torch.tensor([0, 0, 1, 1])) == 75


def test_purposes_and_seeds_draw_differently() -> None:
    keys = [(seed, purpose) for seed in range(3) for purpose in range(4)]
    assert len({float(torch.rand(1, generator=generator(*key))) for key in keys}) == 12


def test_a_lenet_gives_features_for_both_sizes_of_image() -> None:
    for side in (16, 20):
        assert lenet(side, 7)(torch.zeros(3, 1, side, side)).shape == (3, 7)


# MultiMNIST


def grey_split() -> Split:
    """Images of one grey level each, which tells their label."""
    labels = torch.arange(10)
    levels = (labels + 1) / 10
    return Split(levels[:, None, None, None].expand(-1, 1, 16, 16), labels)


def test_a_digit_is_placed_whole_on_a_black_canvas() -> None:
    images = torch.rand(2, 1, 16, 16) + 0.1
    canvases = multimnist.place(images, torch.tensor([[0, 1], [4, 3]]))
    assert canvases[0, :, :16, 1:17].equal(images[0])
    assert canvases[1, :, 4:, 3:19].equal(images[1])
    assert int((canvases > 0).sum()) == 2 * 16 * 16


def test_the_overlay_keeps_both_digits() -> None:
    split = Split(torch.rand(4, 1, 16, 16), torch.arange(4))
    first = multimnist.place(split.images[:2], torch.tensor([[0, 0], [1, 0]]))
    second = multimnist.place(split.images[2:], torch.tensor([[3, 4], [4, 4]]))
    both = multimnist.overlay(first, second)
    assert ((both == first) | (both == second)).all()
    assert (both >= first).all()
    assert (both >= second).all()
    assert both[:, :, 0, 1:3].equal(first[:, :, 0, 1:3])
    assert both[:, :, 19].equal(second[:, :, 19])


def test_the_left_label_is_of_the_upper_left_digit_and_the_right_of_the_other() -> None:
    images, left, right = multimnist.draw(grey_split(), 200, generator(0))
    assert images.shape == (200, 1, 20, 20)
    torch.testing.assert_close(images[:, 0, 1, 1], (left + 1) / 10)
    torch.testing.assert_close(images[:, 0, 18, 18], (right + 1) / 10)
    assert (left != right).any()


def test_both_digits_are_shifted_along_both_axes() -> None:
    images, _, _ = multimnist.draw(grey_split(), 200, generator(0))
    for edge in (
        images[:, 0, 0, 2],
        images[:, 0, 2, 0],
        images[:, 0, 19, 10],
        images[:, 0, 10, 19],
    ):
        black = (edge == 0).float().mean()
        assert 0.3 < black < 0.7


def test_the_left_loss_does_not_train_the_right_head() -> None:
    model = multimnist.TwoHeads()
    left, _ = model(torch.rand(2, 1, 20, 20))
    torch.autograd.backward(left.sum())
    assert all(p.grad is None for p in model.right.parameters())
    assert all(p.grad is not None for p in model.trunk.parameters())


# Adversarial training


def linear_model(weight: Tensor, bias: float = 0.0) -> nn.Module:
    """Two classes; the margin of class 1 is ``weight . image + bias``."""
    layer = nn.Linear(weight.numel(), 2)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([torch.zeros_like(weight), weight]))
        layer.bias.copy_(torch.tensor([0.0, bias]))
    return nn.Sequential(nn.Flatten(), layer)


def test_pgd_stays_in_the_ball_and_in_the_range_of_grey_and_raises_the_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(lenet(16, 8), nn.Linear(8, 10))
    images, labels = torch.rand(16, 1, 16, 16), torch.randint(10, (16,))
    losses = []
    for steps in (0, 5):
        attacked = adversarial.pgd(model, images, labels, 0.1, steps, generator(0))
        assert float((attacked - images).abs().max()) <= 0.1 + 1e-6
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        assert not attacked.requires_grad
        losses.append(float(F.cross_entropy(model(attacked), labels).detach()))
    clean = float(F.cross_entropy(model(images), labels).detach())
    assert losses[1] > max(clean, losses[0])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_pgd_on_a_linear_model_ends_in_the_worst_corner() -> None:
    weight = torch.randn(256, generator=generator(0))
    images = torch.rand(8, 1, 16, 16, generator=generator(1))
    labels = torch.tensor([0, 1] * 4)
    for steps in (5, 20):
        attacked = adversarial.pgd(
            linear_model(weight), images, labels, 0.1, steps, generator(2)
        )
        away = (1 - 2 * labels)[:, None, None, None] * weight.sign().view(1, 1, 16, 16)
        torch.testing.assert_close(attacked, (images + 0.1 * away).clamp(0, 1))


def test_pgd_starts_at_random_all_over_the_ball() -> None:
    images = torch.full((4, 1, 16, 16), 0.5)
    labels = torch.zeros(4, dtype=torch.int64)
    model, draws = linear_model(torch.ones(256)), generator(0)
    one, two = (adversarial.pgd(model, images, labels, 0.1, 0, draws) for _ in range(2))
    assert not one.equal(two)
    assert one.min() < 0.41
    assert one.max() > 0.59


def test_robust_is_what_no_point_of_the_ball_misleads() -> None:
    weight = torch.randn(256, generator=generator(0))
    images = torch.rand(64, 1, 16, 16, generator=generator(1)) * 0.4 + 0.3
    margins = images.flatten(1) @ weight
    bias = -float(margins.median())
    labels = (torch.arange(64) % 8 > 0).long() * ((margins + bias) > 0).long()
    reach = 0.01 * weight.abs().sum()
    right = torch.where(labels == 1, margins + bias > reach, margins + bias < -reach)
    clean = torch.where(labels == 1, margins + bias > 0, margins + bias <= 0)
    expected = 100 * float(right.double().mean())
    assert 0 < expected < 100 * float(clean.double().mean()) < 100
    model = linear_model(weight, bias)
    found = adversarial.robust_accuracy(
        model, Split(images, labels), 0.01, generator(0)
    )
    assert found == pytest.approx(expected)


class Fickle(nn.Module):
    """Gives the next of its answers to whatever is asked outside an attack."""

    def __init__(self, answers: list[int]) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, images: Tensor) -> Tensor:
        logits = images.flatten(1)[:, :2]
        if torch.is_grad_enabled():
            return logits
        return F.one_hot(torch.tensor([self.answers.pop(0)] * len(images)), 2).float()


@pytest.mark.parametrize("answers", [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
def test_one_wrong_answer_of_three_is_not_robust(answers: list[int]) -> None:
    split = Split(torch.rand(2, 1, 16, 16), torch.tensor([0, 0]))
    expected = 0 if any(answers) else 100
    found = adversarial.robust_accuracy(Fickle(answers), split, 0.1, generator(0))
    assert found == expected


def test_the_attack_of_the_test_has_more_steps_and_starts_than_that_of_training() -> (
    None
):
    model = linear_model(torch.ones(256))
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    split = Split(torch.rand(2, 1, 16, 16), torch.tensor([0, 1]))
    adversarial.robust_accuracy(model, split, 0.1, generator(0))
    assert len(calls) == 1 + 2 * (20 + 1)
    assert adversarial.STEPS == 5


def test_the_adversarial_loss_of_a_problem_is_the_larger_one() -> None:
    for problem in adversarial.PROBLEMS:
        training = problem.start(0)
        losses = training.losses(next(training.batches))
        assert losses["adversarial"] > losses["clean"]


# Cells


def test_the_table_is_of_means_and_of_the_worst_values_of_the_same_cells() -> None:
    inputs, targets = cells.table()
    assert inputs.shape == (569, 10)
    assert targets.shape == (569, 8)
    assert {*targets[:, 0].tolist()} == {0, 1}
    assert int(targets[:, 0].sum()) == 212  # malignant, in the data's description
    # Of the ten means: those without the two that follow from the radius, and one more.
    places = [0, 1, 4, 5, 6, 8, 9]
    assert (targets[:, 1:] >= inputs[:, places]).all()
    assert (targets[:, 1:] > inputs[:, places]).float().mean() > 0.99
    malignant = targets[:, 0] == 1
    assert inputs[malignant, 0].mean() > inputs[~malignant, 0].mean()


def test_rows_are_standardised_by_the_training_rows_alone() -> None:
    inputs, targets = cells.table()
    train, test = cells.split((inputs, targets), seed=1)
    assert [len(rows) for rows in (*train, *test)] == [400, 400, 169, 169]
    for columns in (train[0], train[1][:, 1:]):
        torch.testing.assert_close(
            columns.mean(0), torch.zeros(columns.shape[1]), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(columns.std(0), torch.ones(columns.shape[1]))
    assert {*train[1][:, 0].tolist()} == {0, 1}
    rows = {row.numpy().tobytes() for row in train[0]}
    assert not rows & {row.numpy().tobytes() for row in test[0]}
    assert not cells.split((inputs, targets), seed=2)[0][0].equal(train[0])


def test_losses_and_scores_of_cells_are_the_literal_ones() -> None:
    targets = torch.randn(6, 8, generator=generator(0))
    targets[:, 0] = torch.tensor([0.0, 1, 1, 0, 1, 0])
    outputs = dict(
        zip(cells.TASKS, torch.randn(8, 6, generator=generator(1)), strict=True)
    )
    losses, scores = cells.task_losses(outputs, targets), cells.scores(outputs, targets)
    p = outputs["malignant"].sigmoid()
    literal = -(targets[:, 0] * p.log() + (1 - targets[:, 0]) * (1 - p).log()).mean()
    torch.testing.assert_close(losses["malignant"], literal)
    right = ((p > 0.5) == (targets[:, 0] == 1)).sum()
    assert scores["malignant"] == pytest.approx(100 * int(right) / 6)
    for index, task in enumerate(cells.MEASURES, start=1):
        target = targets[:, index]
        squares = (outputs[task] - target).square()
        torch.testing.assert_close(losses[task], squares.mean())
        explained = 1 - squares.sum() / (target - target.mean()).square().sum()
        assert scores[task] == pytest.approx(100 * float(explained), rel=1e-5)
    assert scores[cells.MEAN] == pytest.approx(
        sum(scores[task] for task in cells.TASKS) / 8
    )


def test_each_column_of_cells_is_learned_by_the_head_of_its_name() -> None:
    targets = torch.randn(6, 8, generator=generator(0))
    targets[:, 0] = 1
    perfect = dict(zip(cells.TASKS, targets.unbind(1), strict=True))
    assert set(cells.scores(perfect, targets).values()) == {100}


def shared_update(names: list[str]) -> list[Tensor]:
    """What gh leaves in ``.grad`` with eight tasks in some order."""
    training = cells.start(0)
    losses = training.losses(next(training.batches))
    optimizer = HarmonizedOptimizer(
        training.optimizer, gh, shared_params=training.shared
    )
    optimizer.backward({name: losses[name].double() for name in names})
    last = optimizer.last
    assert last is not None
    assert bool((last.cosines < -0.01).any())  # there is something to do
    assert last.names == tuple(names)
    return [p.grad for p in training.shared if p.grad is not None]


def test_the_order_of_eight_tasks_does_not_change_the_update_of_gh() -> None:
    names = list(cells.TASKS)
    expected = shared_update(names)
    for order in (names[::-1], names[3:] + names[:3]):
        for found, wanted in zip(shared_update(order), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


# Physics-informed networks


def test_the_residual_of_the_exact_solution_is_zero() -> None:
    inside = torch.rand(50, 1, dtype=torch.float64, generator=generator(0))
    residual = pinn.poisson_residual(pinn.poisson_solution, inside)
    assert float(residual.detach().abs().max()) < 1e-12
    inside = torch.rand(50, 2, dtype=torch.float64, generator=generator(0))
    residual = pinn.heat_residual(pinn.heat_solution, inside)
    assert float(residual.detach().abs().max()) < 1e-12


def test_the_residual_of_another_function_is_the_literal_one() -> None:
    points = torch.rand(20, 1, dtype=torch.float64, generator=generator(0))
    pi2 = math.pi**2
    force = pi2 * torch.sin(math.pi * points) + 8 * pi2 * torch.sin(
        4 * math.pi * points
    )
    found = pinn.poisson_residual(lambda x: x**3, points)
    torch.testing.assert_close(found.detach(), (-6 * points - force) / (8 * pi2))
    points = torch.rand(20, 2, dtype=torch.float64, generator=generator(0))
    found = pinn.heat_residual(lambda p: p[:, :1] ** 2 * p[:, 1:] ** 3, points)
    x, t = points[:, :1], points[:, 1:]
    torch.testing.assert_close(found.detach(), 3 * x**2 * t**2 - 0.1 * 2 * t**3)


@pytest.mark.parametrize(
    ("losses_of", "solution", "problem"),
    [
        (pinn.poisson_losses, pinn.poisson_solution, pinn.PROBLEMS[0]),
        (pinn.heat_losses, pinn.heat_solution, pinn.PROBLEMS[1]),
    ],
)
def test_every_loss_is_zero_for_the_solution_and_for_no_other_function(
    losses_of: Callable[..., dict[str, Tensor]],
    solution: pinn.Function,
    problem: Problem,
) -> None:
    batch = tuple(part.double() for part in next(problem.start(0).batches))
    exact = losses_of(solution, batch)
    assert tuple(exact) == problem.tasks
    assert all(float(loss.detach()) < 1e-12 for loss in exact.values())
    other = losses_of(
        lambda points: solution(points) + points.square().sum(1, keepdim=True) + 1,
        batch,
    )
    assert all(float(loss.detach()) > 1e-4 for loss in other.values())


def test_points_of_the_heat_equation_lie_where_their_task_says() -> None:
    inside, edge, first = next(pinn.heat_batches(0))
    for points in (inside, edge, first):
        assert points.min() >= 0
        assert points.max() <= 1
    assert {*edge[:, 0].tolist()} == {0, 1}
    assert len({*edge[:, 1].tolist()}) == len(edge)
    assert (first[:, 1] == 0).all()
    assert len({*first[:, 0].tolist()}) == len(first)
    assert len({*inside.flatten().tolist()}) == inside.numel()


def test_a_relative_error_is_0_for_the_solution_and_100_for_nothing() -> None:
    points = torch.linspace(0, 1, 11)[:, None]
    solution = pinn.poisson_solution
    assert pinn.relative_error(solution, solution, points) == 0
    assert pinn.relative_error(torch.zeros_like, solution, points) == pytest.approx(100)
    twice = pinn.relative_error(lambda x: 3 * solution(x), solution, points)
    assert twice == pytest.approx(200)


# A variational autoencoder


def test_the_divergence_is_that_of_torch() -> None:
    draws = generator(0)
    mean, log_variance = torch.randn(2, 5, 3, generator=draws).unbind()
    encoded = torch.distributions.Normal(mean, (log_variance / 2).exp())
    prior = torch.distributions.Normal(torch.zeros(5, 3), torch.ones(5, 3))
    expected = torch.distributions.kl_divergence(encoded, prior).sum(1).mean()
    torch.testing.assert_close(vae.divergence(mean, log_variance), expected)
    assert float(vae.divergence(torch.zeros(2, 3), torch.zeros(2, 3))) == 0


def test_what_is_missed_is_the_cross_entropy_of_an_image() -> None:
    logits, pixels = torch.randn(4, 6, generator=generator(0)), torch.rand(4, 6)
    shown = logits.sigmoid()
    entropy = -(pixels * shown.log() + (1 - pixels) * (1 - shown).log())
    torch.testing.assert_close(vae.missed(logits, pixels), entropy.sum() / 4)


def test_the_code_is_drawn_with_the_mean_and_deviation_of_the_encoder() -> None:
    model = vae.Vae()
    images, noise = torch.rand(3, 1, 16, 16), torch.randn(3, vae.CODE)
    seen: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    parts = model(images, noise)
    encoded = model.encoder(images)
    mean, log_variance = encoded[:, : vae.CODE], encoded[:, vae.CODE :]
    torch.testing.assert_close(seen[0], mean + log_variance.exp().sqrt() * noise)
    torch.testing.assert_close(parts["KL"], vae.divergence(mean, log_variance))
    again = vae.missed(model.decoder(seen[0]), images.flatten(1))
    torch.testing.assert_close(parts["reconstruction"], again)


def test_the_mean_image_misses_as_much_as_the_page_says() -> None:
    train, test = digits()
    mean = train.images.mean(0).clamp(1e-6, 1 - 1e-6).logit().flatten()
    pixels = test.images.flatten(1)
    assert float(vae.missed(mean.expand_as(pixels), pixels)) == pytest.approx(
        68.4, abs=0.05
    )


def test_the_loss_of_the_vae_is_the_sum_of_its_parts() -> None:
    found = vae.start(0).evaluate()
    assert found["ELBO loss"] == found["reconstruction"] + found["KL"]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_report_calls_a_vae_a_trade_off(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae, "digits", digits)  # the real ones
    training = vae.start(seed)
    optimizer = harmonized(vae.PROBLEM, training, "sum")
    recorder = Recorder()
    recorder.attach(optimizer)
    for batch in islice(training.batches, 200):
        optimizer.step(losses=training.losses(batch))
    (advice,) = judge(recorder.flush()).advice
    assert advice.startswith("A trade-off, not a conflict: ")
    assert '"reconstruction"' in advice
    assert '"KL"' in advice


@pytest.mark.parametrize("name", ["heat", "cells", "multimnist"])
def test_the_report_calls_no_conflict_a_trade_off(name: str) -> None:
    training = PROBLEMS[name].start(0)
    optimizer = harmonized(PROBLEMS[name], training, "sum")
    recorder = Recorder()
    recorder.attach(optimizer)
    for batch in islice(training.batches, 120):
        optimizer.step(losses=training.losses(batch))
    recording = recorder.flush()
    assert recording.conflicts.any()
    assert "trade-off" not in " ".join(judge(recording).advice)
