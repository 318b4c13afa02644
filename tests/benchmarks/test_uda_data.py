"""The data: documented shapes, nothing shared by training and test, clear errors."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.io import savemat

from benchmarks.common.digits import Split
from benchmarks.uda import data
from benchmarks.uda.data import DEMO, Task, batches, load_task
from ghopt.extras import from_extra

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
SHAPES = {"mnist": (60000, 10000, 28), "usps": (7291, 2007, 16)}


def write_fake_files(directory: Path) -> None:
    """A tenth of a percent of the real files: label k is a white image at level k."""
    for name, (_, _, side) in SHAPES.items():
        labels = np.arange(40, dtype=np.uint8) % 10
        images = np.repeat(labels * 25, side * side).reshape(-1, side, side)
        arrays: dict[str, Any] = {}
        for part in ("train", "test"):
            arrays |= {f"x_{part}": images, f"y_{part}": labels}
        np.savez(directory / f"{name}.npz", **arrays)


def assert_documented(split: Split, count: int) -> None:
    assert split.images.shape == (count, 1, 16, 16)
    assert split.images.dtype == torch.float32
    assert split.images.min() >= -1
    assert split.images.max() <= 1
    assert split.labels.shape == (count,)
    assert split.labels.dtype == torch.int64


@pytest.fixture(scope="module")
def demo() -> Task:
    return load_task(DEMO)


def test_the_demo_needs_nothing_but_wheels_and_has_the_documented_shapes(
    demo: Task,
) -> None:
    assert_documented(demo.source, 5000)
    assert_documented(demo.test, 500)
    assert demo.target.shape == (1297, 1, 16, 16)
    assert demo.source.labels.bincount().tolist() == [500] * 10
    # A tenth each, as in the whole file.
    assert all(45 <= count <= 55 for count in demo.test.labels.bincount())


def test_both_demo_domains_use_the_whole_range_of_grey(demo: Task) -> None:
    for images in (demo.source.images, demo.target, demo.test.images):
        assert images.amin() == -1
        assert images.amax() > 0.99


def test_no_target_image_is_both_trained_on_and_tested(demo: Task) -> None:
    train = {image.numpy().tobytes() for image in demo.target}
    test = {image.numpy().tobytes() for image in demo.test.images}
    assert not train & test


@pytest.mark.filterwarnings("ignore:.*is not the file")
def test_every_image_of_a_file_keeps_its_grey_level_and_label(tmp_path: Path) -> None:
    write_fake_files(tmp_path)
    task = load_task("mnist-usps", tmp_path)
    for split in (task.source, task.test):
        assert_documented(split, 40)
        grey = split.images.flatten(1)
        level = split.labels[:, None] * 25 / 127.5 - 1
        torch.testing.assert_close(grey, level.expand_as(grey))


@pytest.mark.filterwarnings("ignore:.*is not the file")
def test_each_part_of_a_task_is_of_its_own_domain_and_split(tmp_path: Path) -> None:
    levels = {}
    for place, (name, (_, _, side)) in enumerate(SHAPES.items()):
        arrays: dict[str, Any] = {}
        for part, level in (("train", 40 * place + 10), ("test", 40 * place + 30)):
            arrays[f"x_{part}"] = np.full((12, side, side), level, np.uint8)
            arrays[f"y_{part}"] = np.zeros(12, np.uint8)
            levels[name, part] = level
        np.savez(tmp_path / f"{name}.npz", **arrays)
    for source, target in (("mnist", "usps"), ("usps", "mnist")):
        task = load_task(f"{source}-{target}", tmp_path)
        assert task.validation is not None
        found = [
            task.source.images,
            task.validation.images,
            task.target,
            task.test.images,
        ]
        assert [round(float((one.mean() + 1) * 127.5)) for one in found] == [
            levels[source, "train"],
            levels[source, "test"],
            levels[target, "train"],
            levels[target, "test"],
        ]


def test_a_task_moves_with_all_its_tensors(task: Task) -> None:
    meta = torch.device("meta")
    for validation in (None, task.test):
        moved = replace(task, validation=validation).to(meta)
        tensors = [*moved.source, moved.target, *moved.test, *(moved.validation or ())]
        assert len(tensors) == (5 if validation is None else 7)
        assert {one.device for one in tensors} == {meta}
        assert moved.name == task.name


@pytest.mark.filterwarnings("ignore:.*is not the file")
def test_mnist_is_shrunk_by_area_and_usps_is_left_alone(tmp_path: Path) -> None:
    write_fake_files(tmp_path)
    generator = np.random.default_rng(0)
    pixels = {
        name: generator.integers(0, 256, (40, side, side), dtype=np.uint8)
        for name, (_, _, side) in SHAPES.items()
    }
    for name, images in pixels.items():
        path = tmp_path / f"{name}.npz"
        with np.load(path) as arrays:
            np.savez(path, **{**arrays, "x_train": images})
    task = load_task("usps-mnist", tmp_path)
    usps = torch.from_numpy(pixels["usps"])[:, None] / 127.5 - 1
    torch.testing.assert_close(task.source.images, usps)
    # 28/16 pixels per side: the first covers pixels 0 and 1 wholly, as torch does it.
    first = torch.from_numpy(pixels["mnist"])[:, :2, :2].float().mean((1, 2))
    torch.testing.assert_close(task.target[:, 0, 0, 0], first / 127.5 - 1)


@pytest.mark.filterwarnings("ignore:.*is not the file")
def test_svhn_is_grey_as_pil_makes_it_and_its_label_10_is_the_digit_0(
    tmp_path: Path,
) -> None:
    write_fake_files(tmp_path)
    generator = np.random.default_rng(0)
    colors, labels = {}, {}
    for part, count in (("train", 12), ("test", 7)):
        colors[part] = generator.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        labels[part] = (np.arange(count, dtype=np.uint8) % 10 + 1)[:, None]
        arrays = {"X": colors[part], "y": labels[part]}
        savemat(tmp_path / f"{part}_32x32.mat", arrays)
    task = load_task("svhn-mnist", tmp_path, size=32)
    assert task.validation is not None
    for part, split in (("train", task.source), ("test", task.validation)):
        for i in range(colors[part].shape[-1]):
            grey = Image.fromarray(colors[part][..., i]).convert("L")
            expected = torch.from_numpy(np.array(grey, np.float32)) / 127.5 - 1
            torch.testing.assert_close(split.images[i, 0], expected)
    assert task.source.labels.tolist() == [*range(1, 10), 0, 1, 2]
    assert task.validation.labels.tolist() == [*range(1, 8)]
    assert task.source.labels.dtype == torch.int64
    # Another size is a mean over pixels, as for the others; the target is MNIST.
    small = load_task("svhn-mnist", tmp_path).source.images
    torch.testing.assert_close(small, F.avg_pool2d(task.source.images, 2))
    mnist = load_task("mnist-usps", tmp_path)
    assert load_task("svhn-mnist", tmp_path).target.equal(mnist.source.images)


@pytest.mark.filterwarnings("ignore:.*is not the file")
def test_a_missing_or_other_file_of_svhn_is_named(tmp_path: Path) -> None:
    write_fake_files(tmp_path)
    for part in ("train", "test"):
        path = tmp_path / f"{part}_32x32.mat"
        message = f"{re.escape(str(path))} is missing: a MATLAB file of X "
        with pytest.raises(FileNotFoundError, match=message + r".*housenumbers"):
            load_task("svhn-mnist", tmp_path)
        savemat(path, {"X": np.zeros((32, 32, 3, 2), np.uint8)})
        with pytest.raises(ValueError, match=r"_32x32\.mat has no y: it should"):
            load_task("svhn-mnist", tmp_path)
        arrays = {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((2, 1))}
        savemat(path, arrays)
    with pytest.raises(ValueError, match=r"train_32x32\.mat is not .* its md5 is "):
        load_task("svhn-mnist", tmp_path, exact=True)


def test_a_missing_file_is_named_with_its_path_and_contents(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load_task("usps-mnist", tmp_path)
    assert str(tmp_path / "usps.npz") in str(error.value)
    assert "https://github.com/" in str(error.value)
    assert "x_train [7291, 16, 16]" in str(error.value)


def test_a_file_with_another_checksum_is_refused_where_runs_are_kept(
    tmp_path: Path,
) -> None:
    write_fake_files(tmp_path)
    with pytest.raises(ValueError, match=r"mnist\.npz is not the file"):
        load_task("mnist-usps", tmp_path, exact=True)


def test_the_same_arrays_in_another_archive_are_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fake_files(tmp_path)
    for name in SHAPES:
        path = tmp_path / f"{name}.npz"
        with np.load(path) as archive:
            arrays = {key: archive[key] for key in data.ARRAYS}
        monkeypatch.setitem(data.SHA256, path.name, data.digest_of(arrays))
        before = path.read_bytes()
        np.savez_compressed(path, **dict(reversed(arrays.items())), more=np.zeros(1))
        assert path.read_bytes() != before
    load_task("mnist-usps", tmp_path, exact=True)
    # But one label more or less is another.
    arrays["y_test"] = arrays["y_test"][::-1]
    np.savez(path, **arrays)
    with pytest.raises(
        ValueError, match=r"its sha256 is [0-9a-f]{64}, not [0-9a-f]{64}"
    ):
        load_task("mnist-usps", tmp_path, exact=True)


def test_a_digest_is_of_names_types_shapes_and_numbers() -> None:
    arrays: list[dict[str, np.ndarray[Any, Any]]] = [
        {"a": np.zeros(4, np.uint8)},
        {"b": np.zeros(4, np.uint8)},
        {"a": np.zeros(4, np.int8)},
        {"a": np.zeros((2, 2), np.uint8)},
        {"a": np.ones(4, np.uint8)},
        {"a": np.zeros(4, np.uint8), "b": np.zeros(4, np.uint8)},
    ]
    assert len({data.digest_of(one) for one in arrays}) == len(arrays)


def test_a_file_with_another_checksum_warns_and_names_it(tmp_path: Path) -> None:
    write_fake_files(tmp_path)
    with (
        pytest.warns(UserWarning, match=r"usps\.npz is not the file") as caught,
        pytest.warns(UserWarning, match=r"mnist\.npz is not the file"),
    ):
        task = load_task("usps-mnist", tmp_path)
    assert caught[0].filename == __file__  # the caller's line, not ours
    # What is trained on them is kept under other keys.
    assert task.foreign == tuple(
        data.digest_of(dict(np.load(tmp_path / f"{name}.npz")))
        for name in ("usps", "mnist")
    )


@pytest.mark.filterwarnings("ignore:.*is not the file")
def test_a_file_that_lacks_an_array_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "usps.npz", x_train=np.zeros(1))
    with pytest.raises(ValueError, match=r"usps\.npz has no x_test, y_test, y_train"):
        load_task("usps-mnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "directory", "message"),
    [
        ("svhn-usps", None, "Invalid task value: svhn-usps"),
        ("svhn-mnist", None, "Invalid directory value: None"),
        ("usps-mnist", None, "Invalid directory value: None"),
        (DEMO, Path("here"), "Invalid directory value: here"),
    ],
)
def test_errors_name_the_argument_and_its_value(
    name: str, directory: Path | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(name, directory)


def test_the_real_files_or_stand_ins_have_the_documented_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = dict.fromkeys(SHAPES, (40, 40))
    directory = tmp_path
    if REAL_DATA.is_dir():
        directory = REAL_DATA
        counts = {name: (train, test) for name, (train, test, _) in SHAPES.items()}
    else:
        write_fake_files(tmp_path)
        hashes = {
            name: data.digest_of(dict(np.load(tmp_path / name))) for name in data.SHA256
        }
        monkeypatch.setattr(data, "SHA256", hashes)
    task = load_task("mnist-usps", directory)
    assert_documented(task.source, counts["mnist"][0])
    assert_documented(task.test, counts["usps"][1])
    assert len(task.target) == counts["usps"][0]
    assert task.foreign == ()
    assert set(task.source.labels.tolist()) == set(range(10))


def test_batches_depend_on_the_seed_alone(task: Task) -> None:
    first = list(batches(task, 8, 6, seed=1))
    torch.rand(3)  # what a method draws in between
    again = list(batches(task, 8, 6, seed=1))
    other = list(batches(task, 8, 6, seed=2))
    for one, two in zip(first, again, strict=True):
        assert all(a.equal(b) for a, b in zip(one, two, strict=True))
    assert not first[0].source.equal(other[0].source)


def test_an_epoch_shows_every_image_once(task: Task) -> None:
    epoch = list(batches(task, 8, 4, seed=0))
    shown = {image.numpy().tobytes() for batch in epoch for image in batch.target}
    assert len(shown) == len(task.target)


def test_images_keep_their_labels_in_batches(task: Task) -> None:
    labels = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(*task.source, strict=True)
    }
    for batch in batches(task, 8, 4, seed=0):
        for image, label in zip(batch.source, batch.labels, strict=True):
            assert labels[image.numpy().tobytes()] == label


@pytest.mark.parametrize("size", [0, 33])
def test_a_batch_that_no_domain_can_fill_is_refused(task: Task, size: int) -> None:
    with pytest.raises(ValueError, match=f"Invalid batch size value: {size}"):
        next(batches(task, size, 1, seed=0))


def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with (
        pytest.raises(ImportError, match=r'mlxtend.*pip install "ghopt\[bench\]"'),
        from_extra("bench"),
    ):
        import mlxtend  # noqa: F401
