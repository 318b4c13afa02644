"""Retrieval: captions say what is annotated, losses and recalls are what they are called."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.mtl.problem import Training, generator
from benchmarks.mtl.problems import retrieval, shapes
from benchmarks.mtl.problems.shapes import Labels
from benchmarks.mtl.train import run


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shapes, "COUNT", 400)
    monkeypatch.setattr(retrieval, "TESTS", 60)
    for cached in (shapes.shapes, retrieval.load):
        cached.cache_clear()
    yield
    for cached in (shapes.shapes, retrieval.load):
        cached.cache_clear()


def encoders(training: Training) -> retrieval.TwoEncoders:
    assert isinstance(training.model, retrieval.TwoEncoders)
    return training.model


def decode(words: Tensor) -> str:
    return " ".join(retrieval.WORDS[index] for index in words.tolist() if index)


# Captions


def labels_of(*boxes: tuple[int, int, int, int]) -> Labels:
    """Category, left, top and size of each."""
    return Labels(
        torch.tensor(
            [[left, top, size, size] for _, left, top, size in boxes]
        ).double(),
        torch.tensor([category for category, *_ in boxes]),
    )


@pytest.mark.parametrize(
    ("boxes", "text"),
    [
        ([(1, 3, 3, 8)], "a small square"),
        ([(1, 3, 3, 11)], "a small square"),
        ([(0, 3, 3, 12)], "a medium circle"),
        ([(0, 3, 3, 15)], "a medium circle"),
        ([(2, 3, 3, 16)], "a large triangle"),
        ([(0, 5, 2, 18), (1, 9, 30, 8)], "a large circle above a small square"),
        # In whatever order they are annotated.
        ([(1, 9, 30, 8), (0, 5, 2, 18)], "a large circle above a small square"),
        ([(0, 0, 10, 8), (2, 30, 12, 8)], "a small circle left of a small triangle"),
        ([(0, 30, 10, 8), (2, 0, 12, 8)], "a small circle right of a small triangle"),
        # Side by side: from the left.
        ([(0, 30, 10, 8), (2, 0, 10, 8)], "a small triangle left of a small circle"),
        # It is the middles that count: here the larger one begins first.
        ([(0, 0, 10, 8), (1, 20, 8, 16)], "a small circle left of a large square"),
        # As far down as across.
        ([(0, 0, 0, 8), (1, 20, 20, 8)], "a small circle above a small square"),
        (
            [(2, 30, 35, 8), (0, 5, 0, 18), (1, 9, 30, 12)],
            "a large circle above a medium square left of a small triangle",
        ),
    ],
)
def test_a_caption_names_shapes_and_places(
    boxes: list[tuple[int, int, int, int]], text: str
) -> None:
    assert retrieval.caption(labels_of(*boxes)) == text


def test_words_are_told_apart_and_follow_the_padding() -> None:
    words = retrieval.encode("a large circle above a small square")
    assert words.shape == (18,)
    assert (words[:11] == 0).all()
    assert (words[11:] > 0).all()
    assert decode(words) == "a large circle above a small square"
    assert len({*retrieval.WORDS}) == len(retrieval.WORDS)


def test_the_longest_caption_fits() -> None:
    four = labels_of((0, 0, 0, 8), (0, 20, 1, 8), (0, 0, 20, 8), (0, 20, 21, 8))
    assert (retrieval.encode(retrieval.caption(four)) > 0).sum() == 18


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match="not in"):
        retrieval.encode("a huge circle")


def test_every_caption_is_of_its_image_and_no_caption_of_the_exam_is_trained_on() -> (
    None
):
    images, annotations = shapes.shapes()
    by_image = {
        image.numpy().tobytes(): retrieval.caption(labels)
        for image, labels in zip(images, shapes.read_coco(annotations), strict=True)
    }
    train, exam = retrieval.load()
    texts = []
    for pairs in (train, exam):
        found = [decode(words) for words in pairs.words]
        assert found == [by_image[image.numpy().tobytes()] for image in pairs.images]
        texts.append(found)
    assert len(texts[1]) == len({*texts[1]}) == 60
    assert not {*texts[0]} & {*texts[1]}
    assert {*texts[0]} | {*texts[1]} == {*by_image.values()}
    assert len(texts[0]) > 300
    first = [[*by_image.values()].index(text) for text in texts[1]]
    assert exam.images.equal(images[first])


def test_the_real_exam_is_of_500_pairs_and_training_of_thousands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    train, exam = retrieval.load()
    assert len(exam.images) == len({*map(decode, exam.words)}) == 500
    assert len(train.images) > 3000


# Encoders


def test_a_caption_is_encoded_alike_however_long_the_others_are() -> None:
    model = encoders(retrieval.start(0))
    images = torch.rand(2, 1, 48, 48, generator=generator(0))
    short = retrieval.encode("a small circle")
    long = retrieval.encode(" above ".join(["a large square"] * 4))
    with torch.no_grad():
        alone = model(images, short[None])
        together = model(images, torch.stack([long, short]))
    assert together.shape == (2, 2)
    torch.testing.assert_close(together[:, 1:], alone)


def test_the_order_of_the_words_matters() -> None:
    model = encoders(retrieval.start(0))
    texts = (
        "a small circle above a large square",
        "a large square above a small circle",
    )
    words = torch.stack([retrieval.encode(text) for text in texts])
    with torch.no_grad():
        cosines = model(torch.rand(1, 1, 48, 48, generator=generator(0)), words)
    assert abs(float(cosines[0, 0] - cosines[0, 1])) > 1e-3


def test_cosines_are_cosines_times_the_scale() -> None:
    training = retrieval.start(0)
    model = encoders(training)
    images, words = next(training.batches)
    with torch.no_grad():
        model.log_scale.fill_(0.0)
        cosines = model(images, words)
        assert float(cosines.abs().max()) <= 1 + 1e-6
        features = model.image(images)
        texts = model.words(model.embedding(words))[0][:, -1]
        literal = F.cosine_similarity(features[:, None], texts[None], dim=2)
        torch.testing.assert_close(cosines, literal)
        model.log_scale.fill_(2.0)
        torch.testing.assert_close(model(images, words), literal * 7.389056)


def test_all_parameters_are_shared_and_both_losses_reach_all() -> None:
    training = retrieval.start(0)
    assert training.shared == [*training.model.parameters()]
    for loss in training.losses(next(training.batches)).values():
        found = torch.autograd.grad(loss, training.shared, retain_graph=True)
        assert all(bool(gradient.any()) for gradient in found)


# Losses and recalls


def test_the_losses_are_the_literal_ones() -> None:
    cosines = torch.randn(4, 4, generator=generator(0)).double()
    words = torch.tensor([[1, 2], [1, 3], [2, 2], [3, 1]])
    losses = retrieval.contrastive_losses(cosines, words)
    assert tuple(losses) == retrieval.PROBLEM.tasks
    exponentials = cosines.exp()
    for name, dim in (("image to text", 1), ("text to image", 0)):
        shares = exponentials.diagonal() / exponentials.sum(dim)
        torch.testing.assert_close(losses[name], -shares.log().mean())


def test_an_equal_caption_of_another_image_is_no_wrong_answer() -> None:
    cosines = torch.randn(3, 3, generator=generator(0)).double()
    losses = retrieval.contrastive_losses(
        cosines, torch.tensor([[1, 2], [1, 3], [1, 2]])
    )
    exponentials = cosines.exp()
    exponentials[0, 2] = exponentials[2, 0] = 0
    for name, dim in (("image to text", 1), ("text to image", 0)):
        shares = exponentials.diagonal() / exponentials.sum(dim)
        torch.testing.assert_close(losses[name], -shares.log().mean())


def test_a_recall_is_the_share_of_the_pairs_among_the_first() -> None:
    cosines = torch.tensor(
        [
            [9.0, 1, 2, 3],  # first
            [5, 4, 1, 2],  # second
            [4, 3, 1, 2],  # fourth
            [1, 2, 4, 3],  # second
        ]
    )
    found = [retrieval.recall(cosines, number) for number in (1, 2, 3, 4)]
    assert found == [25, 75, 75, 100]


def test_who_answers_all_alike_finds_nothing() -> None:
    assert retrieval.recall(torch.ones(20, 20), 19) == 0
    assert retrieval.recall(torch.ones(20, 20), 20) == 100


def test_to_text_ranks_the_captions_of_an_image_and_to_image_the_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of every image, caption 0 is the best answer but one; of every caption, its image
    # is the best.
    cosines = torch.eye(60)
    cosines[:, 0] = 1 + torch.arange(60, 0, -1)
    training = retrieval.start(0)
    monkeypatch.setattr(training.model, "forward", lambda *_: cosines)
    found = training.evaluate()
    assert found["to text R@1"] == pytest.approx(100 / 60)
    assert found["to text R@5"] == 100
    assert found["to image R@1"] == 100


def test_recalls_do_not_fall_with_the_number_of_answers() -> None:
    found = retrieval.start(0).evaluate()
    for way in ("to text", "to image"):
        values = [found[f"{way} R@{number}"] for number in (1, 5, 10, 50, 100)]
        assert values == sorted(values)
        assert values[0] < 20  # of 60: nothing is learned yet
        assert values[-1] == 100


def test_training_makes_pairs_find_each_other() -> None:
    training = retrieval.start(0)
    images, words = (part[:32] for part in next(training.batches))
    for _ in range(40):
        training.optimizer.zero_grad()
        losses = training.losses((images, words))
        torch.autograd.backward(torch.stack([*losses.values()]).sum())
        training.optimizer.step()
    with torch.no_grad():
        cosines = encoders(training)(images, words)
    texts = {tuple(row.tolist()) for row in words}
    assert retrieval.recall(cosines, 5) > 60
    assert len(texts) > 20


def test_a_run_is_repeated_bit_by_bit() -> None:
    one, again = (run(retrieval.PROBLEM, "ghpp", 0, 3) for _ in range(2))
    assert one == again
    assert one.parameters != run(retrieval.PROBLEM, "ghpp", 1, 3).parameters
