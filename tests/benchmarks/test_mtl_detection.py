"""Detection: the shapes are what their annotations say, losses and AP what COCO's are."""

import contextlib
import io
import json
from collections.abc import Iterable
from random import Random
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from benchmarks.mtl.problem import Training, generator
from benchmarks.mtl.problems import detection, shapes
from benchmarks.mtl.problems.average_precision import (
    Detections,
    Truths,
    average_precisions,
    hits,
    interpolated,
    iou,
)
from benchmarks.mtl.problems.shapes import Coco, Labels, Scene, Shape
from benchmarks.mtl.train import run


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> Iterable[None]:
    monkeypatch.setattr(shapes, "COUNT", 120)
    monkeypatch.setattr(detection, "TESTS", 20)
    for cached in (shapes.shapes, detection.load):
        cached.cache_clear()
    yield
    for cached in (shapes.shapes, detection.load):
        cached.cache_clear()


def scenes(count: int, seed: int = 0) -> list[Scene]:
    draws = Random(seed)
    return [shapes.draw_scene(draws) for _ in range(count)]


# Shapes


def test_the_box_of_a_shape_is_that_of_its_pixels() -> None:
    drawn = [shape for scene in scenes(200) for shape in scene]
    assert {(shape.category, shape.size % 2) for shape in drawn} == {
        (category, odd) for category in range(3) for odd in range(2)
    }
    for shape in drawn:
        image = shapes.render([shape])
        assert image.shape == (1, 48, 48)
        _, rows, columns = image.nonzero(as_tuple=True)
        assert (int(columns.min()), int(rows.min())) == (shape.left, shape.top)
        assert int(columns.max()) - shape.left + 1 == shape.size
        assert int(rows.max()) - shape.top + 1 == shape.size
        assert {*image.flatten().tolist()} <= {0, float(torch.tensor(shape.level))}


def test_a_shape_covers_the_area_of_its_kind() -> None:
    for category, share in ((0, 0.785), (1, 1.0), (2, 0.5)):
        covered = shapes.mask(category, 200).double().mean()
        assert float(covered) == pytest.approx(share, abs=0.006)


def test_a_triangle_points_upwards() -> None:
    widths = shapes.mask(2, 15).sum(1)
    assert widths[0] == 1
    assert widths[-1] == 15
    assert (widths.diff() >= 0).all()


def test_an_image_holds_one_to_four_shapes_that_do_not_overlap() -> None:
    drawn = scenes(300)
    assert {len(scene) for scene in drawn} == {1, 2, 3, 4}
    for scene in drawn:
        canvas = torch.zeros(48, 48)
        for shape in scene:
            assert 8 <= shape.size <= 20
            bottom, right = shape.top + shape.size, shape.left + shape.size
            assert min(shape.top, shape.left) >= 0
            assert max(bottom, right) <= 48
            canvas[shape.top : bottom, shape.left : right] += 1
        assert canvas.max() == 1


def test_images_are_their_shapes_in_noise() -> None:
    images, annotations = shapes.shapes()
    assert images.shape == (120, 1, 48, 48)
    labels = shapes.read_coco(annotations)
    for image, label in zip(images, labels, strict=True):
        inside = torch.zeros(48, 48, dtype=torch.bool)
        for box in label.boxes.int().tolist():
            left, top, width, height = box
            middle = image[0, top + height // 2, left + width // 2]
            assert float(middle) > 0.3 - 5 * 0.15
            inside[top : top + height, left : left + width] = True
        outside = image[0][~inside]
        assert abs(float(outside.mean())) < 0.02
        assert float(outside.std()) == pytest.approx(0.15, rel=0.1)
        assert float(image[0][inside].mean()) > 0.1
    assert not (images[0] - images[1]).equal(torch.zeros(1, 48, 48))


# The format of COCO


def test_annotations_say_the_same_after_writing_and_reading_a_file() -> None:
    drawn = [*scenes(50), ()]
    labels = shapes.read_coco(json.loads(json.dumps(shapes.write_coco(drawn))))
    assert len(labels) == len(drawn)
    for label, scene in zip(labels, drawn, strict=True):
        assert label.boxes.shape == (len(scene), 4)
        assert label.boxes.tolist() == [
            [shape.left, shape.top, shape.size, shape.size] for shape in scene
        ]
        assert label.categories.tolist() == [shape.category for shape in scene]
        assert label.categories.dtype == torch.int64


def test_areas_are_of_the_shapes_and_ids_are_unique() -> None:
    drawn = scenes(50)
    written = shapes.write_coco(drawn)
    flat = [(n, shape) for n, scene in enumerate(drawn, 1) for shape in scene]
    assert [one["id"] for one in written["annotations"]] == [*range(1, len(flat) + 1)]
    for one, (image, shape) in zip(written["annotations"], flat, strict=True):
        assert one["image_id"] == image
        assert one["area"] == int((shapes.render([shape]) > 0).sum())
        assert one["iscrowd"] == 0
        assert (
            written["categories"][one["category_id"] - 1]["name"]
            == (("circle", "square", "triangle")[shape.category])
        )
    assert len({one["file_name"] for one in written["images"]}) == 50


def coco_file() -> Coco:
    """As COCO's own: gaps in the ids, more keys, no order, a crowd."""
    text = """{
      "info": {"year": 2017}, "licenses": [],
      "images": [
        {"id": 397133, "width": 640, "height": 427, "file_name": "b.jpg", "license": 4},
        {"id": 37777, "width": 352, "height": 230, "file_name": "a.jpg", "license": 1},
        {"id": 252219, "width": 640, "height": 428, "file_name": "c.jpg", "license": 4}],
      "annotations": [
        {"id": 9, "image_id": 37777, "category_id": 44, "bbox": [1.5, 2, 30.25, 4],
         "area": 70.5, "iscrowd": 0, "segmentation": [[1.5, 2, 31.75, 2, 31.75, 6]]},
        {"id": 3, "image_id": 397133, "category_id": 1, "bbox": [0, 0, 10, 10],
         "area": 99, "iscrowd": 0, "segmentation": []},
        {"id": 900100, "image_id": 397133, "category_id": 1, "bbox": [5, 5, 50, 50],
         "area": 2500, "iscrowd": 1, "segmentation": {"counts": [], "size": [427, 640]}},
        {"id": 4, "image_id": 397133, "category_id": 90, "bbox": [7, 8, 9, 10.5],
         "area": 50, "iscrowd": 0, "segmentation": []}],
      "categories": [
        {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
        {"id": 1, "name": "person", "supercategory": "person"},
        {"id": 44, "name": "bottle", "supercategory": "kitchen"}]
    }"""
    content: Coco = json.loads(text)
    return content


def test_a_file_as_of_coco_itself_is_read() -> None:
    first, second, third = shapes.read_coco(coco_file())
    assert first.boxes.tolist() == [[0, 0, 10, 10], [7, 8, 9, 10.5]]  # no crowd
    assert first.categories.tolist() == [0, 2]
    assert second.boxes.tolist() == [[1.5, 2, 30.25, 4]]
    assert second.categories.tolist() == [1]
    assert third.boxes.shape == (0, 4)
    assert third.categories.dtype == torch.int64


def test_an_annotation_of_an_unknown_image_or_category_is_refused() -> None:
    content = coco_file()
    content["annotations"][1]["image_id"] = 5
    with pytest.raises(ValueError, match="Invalid image_id value: 5"):
        shapes.read_coco(content)
    content = coco_file()
    content["annotations"][0]["category_id"] = 2
    with pytest.raises(ValueError, match="Invalid category_id value: 2"):
        shapes.read_coco(content)


# Average precision


def truths_of(labels: Labels) -> Truths:
    boxes = labels.boxes
    return Truths(
        torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1), labels.categories
    )


def noisy_detections(truths: Truths, draws: torch.Generator) -> Detections:
    """Every truth found none to three times, at various offsets, and false ones."""
    times = torch.randint(4, (len(truths.corners),), generator=draws)
    corners = truths.corners.repeat_interleave(times, 0)
    spread = torch.rand(len(corners), 1, generator=draws) ** 2 * 4
    corners = corners + spread * torch.randn(corners.shape, generator=draws)
    corners[:, 2:] = torch.maximum(corners[:, 2:], corners[:, :2] + 1)
    left_top = torch.rand(2, 2, generator=draws).double() * 30
    false = torch.cat([left_top, left_top + 12], 1)
    names = truths.categories.repeat_interleave(times)
    wrong = torch.randint(3, (len(names),), generator=draws)
    names = names.where(torch.rand(len(names), generator=draws) < 0.8, wrong)
    names = torch.cat([names, torch.randint(3, (2,), generator=draws)])
    # Few values: ties are usual.
    scores = torch.randint(1, 20, (len(names),), generator=draws) / 20
    return Detections(torch.cat([corners, false]), names, scores)


def by_pycocotools(
    content: Coco, found: list[Detections], thresholds: Tensor
) -> list[float]:
    rows: list[dict[str, Any]] = []
    for image, boxes in zip(content["images"], found, strict=True):
        sizes = boxes.corners[:, 2:] - boxes.corners[:, :2]
        for corner, size, category, score in zip(
            boxes.corners.tolist(),
            sizes.tolist(),
            boxes.categories.tolist(),
            boxes.scores.tolist(),
            strict=True,
        ):
            rows.append(
                {
                    "image_id": image["id"],
                    "category_id": category + 1,
                    "bbox": [*corner[:2], *size],
                    "score": score,
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(rows), "bbox")
        judge.params.iouThrs = thresholds.numpy()
        judge.evaluate()
        judge.accumulate()
    precisions = torch.from_numpy(judge.eval["precision"])[:, :, :, 0, -1]
    return [float(one[one > -1].mean()) for one in precisions]


@pytest.mark.parametrize("seed", range(5))
def test_ap_is_that_of_pycocotools(seed: int) -> None:
    content = shapes.write_coco([*scenes(30, seed), ()])
    truths = [truths_of(labels) for labels in shapes.read_coco(content)]
    draws = generator(seed)
    found = [noisy_detections(one, draws) for one in truths]
    expected = by_pycocotools(content, found, detection.THRESHOLDS)
    assert expected[0] > 0.3 > expected[-1] > 0
    ours = average_precisions(found, truths, detection.THRESHOLDS)
    assert ours.tolist() == pytest.approx(expected, abs=1e-12)


def test_ap_is_that_of_pycocotools_with_a_category_that_is_nowhere() -> None:
    content = shapes.write_coco([(Shape(0, 4, 4, 10, 1.0),), (Shape(2, 9, 9, 9, 1.0),)])
    truths = [truths_of(labels) for labels in shapes.read_coco(content)]
    found = [
        Detections(one.corners.repeat(2, 1), torch.tensor([0, 1]), torch.ones(2))
        for one in truths
    ]
    expected = by_pycocotools(content, found, detection.THRESHOLDS)
    assert expected[0] == pytest.approx(0.5)
    ours = average_precisions(found, truths, detection.THRESHOLDS)
    assert ours.tolist() == pytest.approx(expected, abs=1e-12)


def test_only_the_hundred_surest_boxes_of_an_image_count() -> None:
    content = shapes.write_coco([(Shape(0, 4, 4, 10, 1.0),)])
    truths = [truths_of(labels) for labels in shapes.read_coco(content)]
    for wrong, expected in ((99, 0.01), (100, 0.0)):
        far = torch.tensor([[30.0, 30, 40, 40]]).expand(wrong, -1).double()
        found = [
            Detections(
                torch.cat([truths[0].corners, far]),
                torch.zeros(wrong + 1).long(),
                torch.cat([torch.tensor([0.1]), torch.full((wrong,), 0.9)]),
            )
        ]
        half = torch.tensor([0.5], dtype=torch.float64)
        assert by_pycocotools(content, found, half) == pytest.approx([expected])
        ours = average_precisions(found, truths, half)
        assert ours.tolist() == pytest.approx([expected])


def test_perfect_detections_have_an_ap_of_1_and_none_at_all_of_0() -> None:
    labels = shapes.read_coco(shapes.write_coco(scenes(20)))
    truths = [truths_of(one) for one in labels]
    perfect = [Detections(*one, torch.rand(len(one.corners))) for one in truths]
    none = [Detections(*(part[:0] for part in one)) for one in perfect]
    for found, expected in ((perfect, 1.0), (none, 0.0)):
        ours = average_precisions(found, truths, detection.THRESHOLDS)
        assert ours.tolist() == pytest.approx([expected] * 10)


def test_without_any_truth_there_is_no_ap() -> None:
    nothing = Truths(torch.zeros(0, 4), torch.zeros(0).long())
    found = Detections(torch.rand(1, 4), torch.tensor([0]), torch.ones(1))
    assert average_precisions([found], [nothing], torch.tensor([0.5])).isnan().all()


def test_different_numbers_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match="0 images with detections, 1 with truths"):
        average_precisions(
            [], [Truths(torch.zeros(0, 4), torch.zeros(0).long())], torch.ones(1)
        )


def test_iou_is_the_literal_one() -> None:
    first = torch.tensor([[0.0, 0, 4, 2]])
    second = torch.tensor(
        [[0.0, 0, 4, 2], [2, 1, 6, 3], [0, 0, 2, 2], [4, 0, 8, 2], [9, 9, 10, 10]]
    )
    expected = torch.tensor([[1, 2 / 14, 0.5, 0, 0]])
    torch.testing.assert_close(iou(first, second), expected)
    torch.testing.assert_close(iou(second, first), expected.T)


def test_a_truth_is_taken_once_and_by_the_surest() -> None:
    ious = torch.tensor([[0.6, 0.0], [0.9, 0.55], [0.8, 0.7]])
    right = hits(ious, torch.tensor([0.5, 0.65, 0.95]))
    assert right.tolist() == [
        [True, True, False],
        [False, True, True],
        [False, False, False],
    ]


def test_an_iou_of_just_the_threshold_is_enough() -> None:
    exact = torch.tensor([0.5], dtype=torch.float64)
    assert hits(exact[:, None], exact).tolist() == [[True]]


def test_precision_is_interpolated_at_101_recalls() -> None:
    # Of two truths the first is found at once, the other one as the third: the precision
    # is 1 at the recalls 0 ... 0.5, and 2 / 3 at the 50 others.
    right = torch.tensor([[True, False, True], [False, False, True]])
    found = interpolated(right, 2)
    expected = [(51 + 50 * 2 / 3) / 101, 51 / 3 / 101]
    assert found.tolist() == pytest.approx(expected)


# The detector


def test_every_box_has_cells_and_they_tell_it_exactly() -> None:
    labels = shapes.read_coco(shapes.write_coco(scenes(100)))
    categories, distances = detection.targets(labels)
    logits = torch.full((100, 4, 12, 12), -20.0)
    logits.scatter_(1, categories[:, None], 20.0)
    for index, label in enumerate(labels):
        found = detection.decode(logits[index, :3], distances[index])
        truth = truths_of(label)
        assert len(found.corners) == len(truth.corners)
        found_ious = iou(found.corners.double(), truth.corners)
        best, which = found_ious.max(0)
        torch.testing.assert_close(best, torch.ones_like(best))
        assert found.categories[which].equal(truth.categories)
    counts = (categories != 3).flatten(1).sum(1)
    boxes = torch.tensor([len(label.boxes) for label in labels])
    assert (counts >= boxes).all()
    assert (counts <= 4 * boxes).all()
    assert (distances.flatten(2).sum(1) > 0).equal(categories.flatten(1) != 3)


def test_the_cells_of_a_box_are_those_around_its_middle() -> None:
    # Its middle is (15, 24); those of the cells are at 2, 6, 10, 14, 18, 22, 26, ...
    labels = Labels(torch.tensor([[10.0, 20, 10, 8]]).double(), torch.tensor([1]))
    categories, distances = detection.targets([labels])
    places = (categories[0] != 3).nonzero().tolist()
    assert places == [[5, 3], [5, 4], [6, 3], [6, 4]]
    assert categories[0, 5, 3] == 1
    assert distances[0, :, 5, 3].tolist() == [4, 2, 6, 6]
    assert distances[0, :, 6, 4].tolist() == [8, 6, 2, 2]


def test_an_image_without_a_box_has_no_cells() -> None:
    empty = Labels(torch.zeros(0, 4).double(), torch.zeros(0).long())
    other = Labels(torch.tensor([[10.0, 20, 10, 8]]).double(), torch.tensor([1]))
    categories, _ = detection.targets([empty, other])
    assert (categories[0] == 3).all()
    assert (categories[1] != 3).sum() == 4


def test_the_focal_loss_is_the_literal_one() -> None:
    logits = torch.randn(2, 3, 4, 4, generator=generator(0))
    categories = torch.randint(4, (2, 4, 4), generator=generator(1))
    literal, objects = 0.0, 0
    for image in range(2):
        for row in range(4):
            for column in range(4):
                name = int(categories[image, row, column])
                objects += name != 3
                for index in range(3):
                    p = float(logits[image, index, row, column].sigmoid())
                    q, weight = (p, 0.25) if index == name else (1 - p, 0.75)
                    literal -= weight * (1 - q) ** 2 * float(torch.tensor(q).log())
    found = detection.focal_loss(logits, categories)
    assert float(found) == pytest.approx(literal / objects, rel=1e-5)


def test_the_box_loss_is_one_minus_the_literal_generalized_iou() -> None:
    estimates = torch.tensor([[1.0, 1, 1, 1], [3, 1, 1, 1]]).view(2, 4, 1, 1)
    distances = torch.tensor([[1.0, 1, 1, 1], [1, 2, 1, 1]]).view(2, 4, 1, 1)
    both = torch.ones(2, 1, 1, dtype=torch.bool)
    # The second: 4x2 with 2x3 around the same point: common 2x2, hull 4x3.
    union = 8 + 6 - 4
    second = 1 - (4 / union - (12 - union) / 12)
    assert float(detection.box_loss(estimates, distances, both)) == pytest.approx(
        second / 2
    )
    one = torch.tensor([False, True]).view(2, 1, 1)
    found = detection.box_loss(estimates, distances, one)
    assert float(found) == pytest.approx(second)


def test_a_surer_box_suppresses_those_of_its_category_that_overlap() -> None:
    corners = torch.tensor(
        [[0.0, 0, 10, 10], [1, 0, 11, 10], [1, 0, 11, 10], [7, 0, 17, 10]]
    )
    assert detection.suppress(corners, torch.tensor([0, 0, 1, 0])) == [0, 2, 3]
    # What is suppressed suppresses nothing.
    chain = torch.tensor([[0.0, 0, 10, 10], [3, 0, 13, 10], [6, 0, 16, 10]])
    assert detection.suppress(chain, torch.zeros(3)) == [0, 2]


def test_unsure_cells_give_no_box_and_the_surest_come_first() -> None:
    logits = torch.full((3, 12, 12), -9.0)
    logits[2, 1, 1], logits[0, 8, 8], logits[1, 5, 5] = 1.0, 2.0, -2.9  # 0.0522
    found = detection.decode(logits, torch.full((4, 12, 12), 4.0))
    assert found.categories.tolist() == [0, 2, 1]
    assert found.corners[0].tolist() == [30, 30, 38, 38]
    expected = torch.tensor([2.0, 1.0, -2.9]).sigmoid()
    torch.testing.assert_close(found.scores, expected)
    logits[1, 5, 5] = -3.0  # 0.047
    assert len(detection.decode(logits, torch.ones(4, 12, 12)).scores) == 2


def test_an_untrained_detector_claims_almost_nothing() -> None:
    model = detection.start(0).model
    logits, distances = model(shapes.shapes()[0][:8])
    assert logits.shape == (8, 3, 12, 12)
    assert distances.shape == (8, 4, 12, 12)
    assert (distances > 0).all()
    assert float(logits.detach().sigmoid().mean()) < 0.02


def test_each_loss_trains_its_own_head_and_both_the_trunk() -> None:
    for own in range(2):
        training = detection.start(0)
        model = training.model
        assert isinstance(model, detection.Detector)
        losses = [*training.losses(next(training.batches)).values()]
        torch.autograd.backward(losses[own])
        heads = (model.classify, model.locate)
        assert all(p.grad is not None for p in heads[own].parameters())
        assert all(p.grad is None for p in heads[1 - own].parameters())
        assert all(p.grad is not None for p in training.shared)


def test_the_exam_is_of_images_that_are_not_trained_on() -> None:
    data = detection.load()
    assert len(data.images) == len(data.categories) == len(data.distances) == 100
    assert len(data.exam) == len(data.truths) == 20
    images, annotations = shapes.shapes()
    assert data.images.equal(images[:100])
    assert data.exam.equal(images[100:])
    labels = shapes.read_coco(annotations)
    assert data.truths[3].corners.equal(truths_of(labels[103]).corners)
    assert data.categories[7].equal(detection.targets(labels[7:8])[0][0])


def test_the_columns_of_the_paper_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def staircase(_: object, __: object, thresholds: Tensor) -> Tensor:
        return 1 - thresholds

    monkeypatch.setattr(detection, "average_precisions", staircase)
    assert detection.start(0).evaluate() == pytest.approx(
        {"AP": 27.5, "AP50": 50, "AP60": 40, "AP70": 30, "AP80": 20, "AP90": 10}
    )


def test_a_few_steps_already_lower_both_losses() -> None:
    def both(training: Training) -> list[float]:
        batch = next(training.batches)
        return [float(one.detach()) for one in training.losses(batch).values()]

    training = detection.start(0)
    before = both(training)
    for _ in range(25):
        training.optimizer.zero_grad()
        losses = training.losses(next(training.batches))
        torch.autograd.backward(torch.stack([*losses.values()]).sum())
        training.optimizer.step()
    after = both(training)
    assert after[0] < 0.8 * before[0]
    assert after[1] < 0.8 * before[1]


def test_a_run_is_repeated_bit_by_bit() -> None:
    one, again = (run(detection.PROBLEM, "ghpp", 0, 3) for _ in range(2))
    assert one == again
    assert one.parameters != run(detection.PROBLEM, "ghpp", 1, 3).parameters
