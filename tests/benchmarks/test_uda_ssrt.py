"""SSRT: the transformer, the losses against literal loops, and Safe Training."""

import math
from collections.abc import Iterable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks.common.digits import Split
from benchmarks.uda.data import Batch, Task, batches
from benchmarks.uda.methods import domain_loss, warm_up
from benchmarks.uda.methods.networks import Networks, build_networks
from benchmarks.uda.methods.ssrt import (
    CONFIDENT,
    DROP,
    FAINT,
    FROM_CLEAN,
    INTERVAL,
    LAYERS,
    LEVELS,
    OFFSET,
    REVERSAL,
    WEIGHT,
    SafeTraining,
    drops,
    perturb,
    refinement_loss,
    ssrt_losses,
)
from benchmarks.uda.methods.steps import Config, make_step, safe_interval
from benchmarks.uda.methods.updates import (
    harmonized,
    looking_at_unrelated,
    plain_update,
)
from benchmarks.uda.methods.vit import VisionTransformer
from benchmarks.uda.runs.train import run
from ghopt import Recorder
from tests.benchmarks.modules import gradients, same, values


@pytest.fixture
def networks() -> Networks:
    return build_networks("SSRT", seed=0)


def vit_of(networks: Networks) -> VisionTransformer:
    assert isinstance(networks.generator, VisionTransformer)
    return networks.generator


@pytest.mark.parametrize(("size", "tokens"), [(16, 17), (28, 50)])
def test_the_transformer_cuts_digits_of_both_sizes_into_patches(
    size: int, tokens: int
) -> None:
    networks = build_networks("SSRT", 0, size)
    vit, images = vit_of(networks), torch.zeros(3, 1, size, size)
    assert vit.embed(images).shape == (3, tokens, 64)
    assert vit(images).shape == (3, 64)
    torch.testing.assert_close(networks(images).sum(1), torch.ones(3))


@pytest.mark.parametrize("size", [0, 2, 18])
def test_images_that_patches_do_not_tile_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"Invalid size value: {size}"):
        VisionTransformer(size)


def test_the_transformer_has_the_documented_size() -> None:
    count = sum(one.numel() for one in VisionTransformer(16).parameters())
    assert count == pytest.approx(140_000, rel=0.05)


def test_the_transformer_in_parts_is_the_whole(
    networks: Networks, batch: Batch
) -> None:
    vit = vit_of(networks)
    for layer in range(vit.depth + 1):
        tokens = vit.advance(vit.embed(batch.target), 0, layer)
        torch.testing.assert_close(vit.finish(tokens, layer), vit(batch.target))


def test_the_transformer_knows_where_a_patch_lies_and_what_the_others_show(
    networks: Networks, batch: Batch
) -> None:
    vit = vit_of(networks)
    moved = batch.target.roll(4, dims=3)
    assert (vit(moved) - vit(batch.target)).abs().max() > 1e-3
    # The class's token knows no image before the blocks, and knows it after them.
    first = vit.embed(batch.target)[:, 0]
    assert first.equal(first[:1].expand_as(first))
    assert vit(batch.target).std(0).max() > 1e-3


def test_the_features_are_of_the_class_s_token_alone(networks: Networks) -> None:
    vit, tokens = vit_of(networks), torch.randn(2, 17, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(vit.finish(tokens, vit.depth)[:, 0].sum(), tokens)
    assert gradient[:, 0].abs().max() > 0
    assert gradient[:, 1:].abs().max() == 0


def test_a_perturbation_leads_part_of_the_way_to_another_image_of_the_batch() -> None:
    tokens = torch.randn(3, 2, 4, requires_grad=True)
    moved = perturb(tokens, 1, 0.25)
    for image, other in ((0, 2), (1, 0), (2, 1)):
        expected = 0.75 * tokens[image] + 0.25 * tokens[other]
        torch.testing.assert_close(moved[image], expected)


def test_the_offset_of_a_perturbation_is_a_constant() -> None:
    tokens = torch.randn(3, 2, 4, requires_grad=True)
    factors = torch.randn(3, 2, 4)
    (gradient,) = torch.autograd.grad(
        (perturb(tokens, 1, 0.25) * factors).sum(), tokens
    )
    torch.testing.assert_close(gradient, factors)


def test_the_refinement_is_the_literal_divergence_of_the_confident_images() -> None:
    # In both surest predictions lie on the two sides of 0.4.
    teacher = torch.tensor([[0.41, 0.3, 0.29], [0.39, 0.31, 0.3], [0.8, 0.1, 0.1]])
    student = torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05], [0.34, 0.33, 0.33]])
    literal = sum(
        p * math.log(p / q)
        for n in (0, 2)
        for p, q in zip(teacher[n].tolist(), student[n].tolist(), strict=True)
    )
    found = refinement_loss(teacher.log(), student.log())
    assert found.item() == pytest.approx(literal / 2, rel=1e-5)


def test_without_a_confident_image_there_is_nothing_to_refine() -> None:
    unsure = torch.zeros(4, 10, requires_grad=True)
    loss = refinement_loss(unsure, torch.randn(4, 10))
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, unsure)
    assert gradient.equal(torch.zeros(4, 10))


def test_the_refinement_moves_teacher_and_student() -> None:
    teacher = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    student = torch.tensor([[0.0, 1.0, 0.0]], requires_grad=True)
    loss = refinement_loss(teacher, student)
    for one in torch.autograd.grad(loss, [teacher, student]):
        assert one.abs().max() > 0.1


def literal_losses(
    networks: Networks, batch: Batch, layer: int, shift: int, from_clean: bool
) -> tuple[Tensor, Tensor]:
    """The adversarial loss, not reversed, and the self-refinement, image by image."""
    vit, head = vit_of(networks), networks.heads[0]
    features = torch.cat([vit(batch.source), vit(batch.target)])
    pairs = []
    for n in range(len(batch.target)):
        own, other = (
            vit.advance(vit.embed(batch.target[m : m + 1]), 0, layer)
            for m in (n, (n - shift) % len(batch.target))
        )
        moved = vit.finish(own + OFFSET * (other - own), layer)
        pairs.append((head(vit(batch.target[n : n + 1])), head(moved)))
    clean, perturbed = (torch.cat(one) for one in zip(*pairs, strict=True))
    teacher, student = (clean, perturbed) if from_clean else (perturbed, clean)
    return domain_loss(networks.discriminator(features)), refinement_loss(
        teacher, student
    )


def test_the_constants_are_those_of_the_published_code() -> None:
    assert (OFFSET, FROM_CLEAN, CONFIDENT, WEIGHT, REVERSAL) == (
        0.3,
        0.5,
        0.4,
        0.2,
        0.1,
    )
    assert (INTERVAL, LEVELS, DROP, FAINT) == (1000, 4, 1.0, 0.1)


def sharpen(networks: Networks) -> None:
    """Make an untrained head sure of itself, so that there is something to refine."""
    with torch.no_grad():
        for weight in networks.heads.parameters():
            weight.mul_(8)


def test_the_alignment_loss_is_one_of_its_literal_values_and_takes_each_of_them(
    networks: Networks, batch: Batch
) -> None:
    sharpen(networks)
    batch = Batch(*(part[:4] for part in batch))
    literal = {}
    for layer in LAYERS:
        for shift in range(1, len(batch.target)):
            for from_clean in (True, False):
                domain, refinement = literal_losses(
                    networks, batch, layer, shift, from_clean
                )
                value = 2 * (2 * domain + WEIGHT * refinement)
                literal[layer, shift, from_clean] = value.item()
    assert len({round(value, 6) for value in literal.values()}) == 18
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        found = ssrt_losses(networks, batch, 1.0, 2.0)[0].alignment.item()
        near = min(literal, key=lambda key: abs(literal[key] - found))
        assert found == pytest.approx(literal[near], abs=2e-6)
        seen.add(near)
    assert {layer for layer, _, _ in seen} == set(LAYERS)
    assert {shift for _, shift, _ in seen} == {1, 2, 3}
    assert {from_clean for _, _, from_clean in seen} == {True, False}


def test_the_strength_weighs_the_refinement_and_shortens_the_offset(
    networks: Networks, batch: Batch
) -> None:
    sharpen(networks)

    def excess(strength: float) -> float:
        torch.manual_seed(0)
        losses, _ = ssrt_losses(networks, batch, 1.0, 1.0, strength)
        features = torch.cat([networks.generator(part) for part in batch[::2]])
        domain = domain_loss(networks.discriminator(features))
        return (losses.alignment - 2 * domain).item()

    assert excess(0) == 0
    assert excess(1) > 0
    # Half the weight, and a divergence that falls with about the offset's square.
    assert 1 / 16 < excess(0.5) / excess(1) < 1 / 4


def test_the_domain_loss_is_reversed_for_the_transformer_alone(
    networks: Networks, batch: Batch
) -> None:
    def pull(coefficient: float, module: nn.Module) -> list[Tensor]:
        losses, _ = ssrt_losses(networks, batch, coefficient, 1.0, strength=0)
        return gradients(losses.alignment, module)

    for own, plain in zip(
        pull(0.5, networks.generator), pull(-1.0, networks.generator), strict=True
    ):
        torch.testing.assert_close(own, -0.5 * plain)
    for own, plain in zip(
        pull(0.5, networks.discriminator),
        pull(-1.0, networks.discriminator),
        strict=True,
    ):
        torch.testing.assert_close(own, plain)
    features = torch.cat([networks.generator(part) for part in batch[::2]])
    unturned = 2 * domain_loss(networks.discriminator(features))
    for own, plain in zip(
        pull(1.0, networks.generator),
        gradients(unturned, networks.generator),
        strict=True,
    ):
        torch.testing.assert_close(own, -REVERSAL * plain)
    assert max(one.abs().max() for one in pull(1.0, networks.generator)) > 0


def test_the_classification_loss_is_that_of_the_source_and_nobody_else_s(
    networks: Networks, batch: Batch
) -> None:
    probabilities = networks(batch.source).detach()
    literal = -sum(
        math.log(probabilities[n, label].item())
        for n, label in enumerate(batch.labels.tolist())
    ) / len(batch.labels)
    for trade_off in (1.0, 3.0):
        losses, _ = ssrt_losses(networks, batch, 1.0, trade_off)
        assert losses.classification.item() == pytest.approx(literal, rel=1e-5)


def test_the_predicted_classes_are_those_of_the_clean_target(
    networks: Networks, batch: Batch
) -> None:
    sharpen(networks)
    _, predicted = ssrt_losses(networks, batch, 1.0, 1.0)
    assert predicted.equal(networks(batch.target).argmax(1))
    assert len(set(predicted.tolist())) > 1


def test_every_call_draws_the_same_from_the_global_random_state(
    networks: Networks, batch: Batch
) -> None:
    states = []
    for coefficient, trade_off, strength in ((1.0, 1.0, 0.0), (0.0, 2.0, 1.0)):
        torch.manual_seed(5)
        ssrt_losses(networks, batch, coefficient, trade_off, strength)
        states.append(torch.get_rng_state())
    assert same(states[:1], states[1:])


@pytest.mark.parametrize(
    ("series", "dropped"),
    [
        ([9.0] * 1000, False),
        ([n / 100 for n in range(1000)], False),  # a rise
        ([9.0] * 500 + [7.9] * 500, True),  # halves tell
        ([9.0] * 500 + [8.0] * 500, False),  # not by more than a class
        ([9.0] * 938 + [7.9] * 62, True),  # sixteenths alone tell
        ([9.0] * 969 + [7.5] * 31, False),  # averaged away
        ([9 - n / 520 for n in range(1000)], False),  # slowly, by 0.96 for the halves
        ([9 - n / 480 for n in range(1000)], True),  # a bit faster
        ([9.0] * 62 + [7.9] * 62, True),  # a short series: halves tell
        ([9.0] * 93 + [7.9] * 31, False),  # but nothing shorter does
        ([9.0] * 186 + [7.9] * 62, True),  # a longer one: quarters
        ([9.0] * 185 + [7.9] * 62, False),  # too short for them by one
        ([9.0, 7.0], True),
    ],
)
def test_a_drop_is_a_fall_by_more_than_a_class_at_some_scale(
    series: list[float], dropped: bool
) -> None:
    assert drops(torch.tensor(series)) is dropped


@pytest.mark.parametrize(
    ("before", "series", "dropped"),
    [
        ([9.0] * 1000, [8.1] * 1000, False),
        ([9.0] * 1000, [7.9] * 1000, True),
        ([7.0] * 1000, [7.9] * 1000, False),  # a rise
        ([10.0] * 500 + [8.5] * 500, [8.0] * 1000, True),  # the whole alone tells
        ([7.0] * 500 + [9.0] * 500, [7.5] * 1000, True),  # the last half alone tells
        ([9.0] * 500 + [7.0] * 500, [7.5] * 1000, False),
        # Sixteenths alone tell, of which both are the ones that meet.
        ([8.5] * 938 + [9.0] * 62, [7.9] * 63 + [8.5] * 937, True),
        ([8.5] * 46 + [9.0] * 16, [7.9] * 16 + [8.5] * 46, False),  # too short for them
    ],
)
def test_a_drop_from_the_end_of_the_series_before_counts(
    before: list[float], series: list[float], dropped: bool
) -> None:
    assert not drops(torch.tensor(series))
    assert drops(torch.tensor(series), torch.tensor(before)) is dropped


def train_safely(
    safe: SafeTraining, module: nn.Linear, diversities: Iterable[int]
) -> list[float]:
    """Move a weight by 1 in every step, and return the strengths before the steps."""
    strengths = []
    for diversity in diversities:
        strengths.append(safe.strength)
        with torch.no_grad():
            module.weight += 1
        safe.after_step(torch.arange(64) % diversity)
    return strengths


@pytest.fixture
def counter() -> nn.Linear:
    module = nn.Linear(1, 1)
    nn.init.zeros_(module.weight)
    return module


def test_the_strength_rises_as_a_sine_in_one_interval_and_stays(
    counter: nn.Linear,
) -> None:
    strengths = train_safely(SafeTraining(counter, 16), counter, [9] * 48)
    expected = [math.sin(math.pi / 2 * n / 16) for n in range(16)] + [1.0] * 32
    assert strengths == pytest.approx(expected)


def test_after_a_drop_networks_and_strength_return(counter: nn.Linear) -> None:
    safe = SafeTraining(counter, 16)
    train_safely(safe, counter, [9] * 40 + [4] * 7)
    assert safe.restored == 0
    assert counter.weight.item() == 47
    # The last batch of the third interval: to the end of the second.
    train_safely(safe, counter, [4])
    assert safe.restored == 1
    assert counter.weight.item() == 32
    assert safe.strength == 0
    # The snapshot outlives what follows: a second return is to the same weights.
    train_safely(safe, counter, [9] * 8 + [4] * 8)
    assert safe.restored == 2
    assert counter.weight.item() == 32


def test_a_drop_within_the_first_interval_has_nowhere_to_return_to(
    counter: nn.Linear,
) -> None:
    safe = SafeTraining(counter, 16)
    train_safely(safe, counter, [9] * 8 + [2] * 8)
    assert (safe.restored, counter.weight.item(), safe.strength) == (0, 16, 1)


def test_a_drop_between_two_intervals_is_one_of_the_second(counter: nn.Linear) -> None:
    safe = SafeTraining(counter, 16)
    train_safely(safe, counter, [9] * 32 + [3] * 16)
    assert (safe.restored, counter.weight.item()) == (1, 32)
    # What dropped is not what the next interval is compared with.
    train_safely(safe, counter, [3] * 16)
    assert safe.restored == 2
    train_safely(safe, counter, [9] * 16)
    assert safe.restored == 2


def test_drops_one_after_the_other_slow_the_strength_for_good(
    counter: nn.Linear,
) -> None:
    bad = [9] * 8 + [4] * 8
    safe = SafeTraining(counter, 16)
    # The first comes when the strength has risen.
    train_safely(safe, counter, [9] * 32 + bad)
    train_safely(safe, counter, [9] * 8)
    assert safe.strength == pytest.approx(math.sqrt(0.5))
    train_safely(safe, counter, [4] * 8)
    assert safe.restored == 2
    # Over two intervals now: the sine of an eighth of a turn after one of them.
    train_safely(safe, counter, [9] * 16)
    assert safe.strength == pytest.approx(math.sqrt(0.5))
    train_safely(safe, counter, [9] * 32 + bad)
    assert safe.restored == 3
    train_safely(safe, counter, [9] * 16)
    assert safe.strength == pytest.approx(math.sqrt(0.5))


def test_a_faint_refinement_is_not_to_blame_for_a_drop(counter: nn.Linear) -> None:
    bad = [9] * 8 + [4] * 8
    safe = SafeTraining(counter, 16)
    # Four drops while it rises, so that an interval of the next is a sixteenth of it.
    train_safely(safe, counter, [9] * 32 + bad * 5)
    assert safe.restored == 5
    train_safely(safe, counter, [9] * 8)
    assert safe.strength < 0.05
    train_safely(safe, counter, [4] * 8)
    assert safe.restored == 5
    assert safe.strength == pytest.approx(math.sin(math.pi / 32))
    assert counter.weight.item() == 32 + 16


def test_an_interval_that_cannot_be_cut_is_refused(counter: nn.Linear) -> None:
    SafeTraining(counter, 2)
    with pytest.raises(ValueError, match="Invalid interval value: 1"):
        SafeTraining(counter, 1)


def test_a_short_run_still_looks_ten_times() -> None:
    assert [safe_interval(n) for n in (4, 2500, 50_000)] == [2, 250, INTERVAL]


def test_training_learns_the_source(task: Task) -> None:
    config = Config(task.name, "SSRT", "gh", seed=0, steps=15, batch_size=8)
    networks = build_networks("SSRT", 0)
    step = make_step(config, networks, partial(harmonized, rule="gh"))
    few = Split(task.source.images[:8], task.source.labels[:8])

    def right() -> int:
        return int((networks(few.images).argmax(1) == few.labels).sum())

    assert right() < 5
    for done in range(15):
        batch = Batch(few.images, few.labels, task.target[:8])
        step(batch, done / 15)
    assert right() == 8


def test_the_pair_of_losses_meets_on_the_transformer(
    networks: Networks, batch: Batch
) -> None:
    config = Config("noise-noise", "SSRT", "gh", seed=0, steps=16, batch_size=8)
    recorder = Recorder()
    make_update = partial(harmonized, rule="gh", recorder=recorder)
    step = make_step(config, networks, make_update)
    step(batch, 0.0)
    torch.manual_seed(3)
    # What the second step will see: reversal and refinement have begun.
    strength = math.sin(math.pi / 4)
    losses, _ = ssrt_losses(networks, batch, warm_up(0.5), 1.0, strength)
    jacobian = torch.stack(
        [
            torch.cat([one.flatten() for one in gradients(loss, networks.generator)])
            for loss in losses
        ]
    ).double()
    torch.manual_seed(3)
    step(batch, 0.5)
    gramian = recorder.flush().gramians[1]
    assert gramian.diagonal().min() > 0
    torch.testing.assert_close(gramian, jacobian @ jacobian.T)


def test_the_sum_of_the_wrapper_trains_like_the_plain_sum(task: Task) -> None:
    config = Config(task.name, "SSRT", "sum", seed=0, steps=4, batch_size=8)
    trained = []
    looking = partial(
        looking_at_unrelated,
        make_update=partial(harmonized, rule="sum"),
        null=[],
        every=2,
    )
    for make_update in (plain_update, looking):
        networks = build_networks("SSRT", seed=0)
        step = make_step(config, networks, make_update)
        for done, batch in enumerate(batches(task, 8, 4, seed=0)):
            step(batch, done / 4)
        trained.append(values(networks))
    for one, two in zip(*trained, strict=True):
        torch.testing.assert_close(one, two)


def test_a_run_that_starts_anew_is_the_same_to_the_last_bit(task: Task) -> None:
    config = Config(task.name, "SSRT", "gh", seed=2, steps=24, batch_size=8)
    first = run(config, task)
    torch.rand(3)  # what was drawn before is forgotten
    assert run(config, task) == first
    assert len(first.before) == 24


def test_runs_of_a_seed_draw_the_same_under_every_rule(task: Task) -> None:
    states = []
    for rule in ("sum", "gh"):
        run(Config(task.name, "SSRT", rule, seed=0, steps=5, batch_size=8), task)
        states.append(torch.get_rng_state())
    assert same(states[:1], states[1:])
