"""Data sets of images: their published forms, clear errors, views and batches."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.uda.data import Batch
from benchmarks.uda.data.image_lists import DATA_SETS, Domain, Task, load_task
from benchmarks.uda.data.images import (
    CROP,
    batches,
    center_view,
    normalize,
    ordered_batches,
    random_view,
    read_image,
)

VISDA = (
    *("aeroplane", "bicycle", "bus", "car", "horse", "knife", "motorcycle", "person"),
    *("plant", "skateboard", "train", "truck"),
)


def class_names(data_set: str) -> list[str]:
    """As many as there are, in another order than that of the alphabet."""
    if data_set == "visda-2017":
        return list(VISDA)
    count = DATA_SETS[data_set].classes
    return [f"class_{(7 * label) % count:03}" for label in range(count)]


def write_images(
    folder: Path, names: list[str], count: int = 1, suffix: str = ".jpg"
) -> list[str]:
    """Write images of a class's own grey, return their paths below the folder."""
    paths = []
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            path = f"{name}/{number:05}{suffix}"
            Image.new("L", (6, 4), color=255 - label % 256).save(folder / path)
            paths.append(path)
    return paths


def write_list(file: Path, prefix: str, paths: list[str], names: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{prefix}{path} {names.index(Path(path).parent.name)}" for path in paths]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_office31(root: Path, **other: Any) -> None:
    """The folders of Office-31's archive, without lists."""
    for domain in ("amazon", "webcam"):
        names = class_names("office-31")
        write_images(root / domain / "images", names, **other)


def list_office31(root: Path, domain: str, names: list[str] | None = None) -> Path:
    """A list in the form of CDAN, for images that are there."""
    names = names or class_names("office-31")
    paths = [f"{name}/00000.jpg" for name in names]
    file = root / f"{domain}_list.txt"
    prefix = f"/data/office/domain_adaptation_images/{domain}/images/"
    write_list(file, prefix, paths, names)
    return file


# Published forms.


def as_cdan(root: Path) -> tuple[str, str, str]:
    write_office31(root)
    list_office31(root, "amazon")
    list_office31(root, "webcam")
    return "office-31", "amazon", "webcam"


def as_dalib(root: Path) -> tuple[str, str, str]:
    names = class_names("office-home")
    for domain in ("Art", "Real_World"):
        paths = write_images(root / domain, names)
        write_list(root / "image_list" / f"{domain}.txt", f"{domain}/", paths, names)
    return "office-home", "Real_World", "Art"


def as_ssrt(root: Path) -> tuple[str, str, str]:
    names = class_names("office-home")
    for domain in ("Art", "Product"):
        paths = write_images(root / "images" / domain, names)
        prefix = f"./data/office-home/images/{domain}/"
        write_list(root / f"{domain}.txt", prefix, paths, names)
    return "office-home", "Product", "Art"


def as_visda(root: Path) -> tuple[str, str, str]:
    for domain in ("train", "validation"):
        names = class_names("visda-2017")
        paths = write_images(root / domain, names, suffix=".png")
        # The first is of the class "train", in the folder train/train.
        paths.sort(key=lambda path: not path.startswith("train"))
        write_list(root / domain / "image_list.txt", "", paths, names)
        (root / domain / "bus" / "unlisted.png").touch()
    return "visda-2017", "train", "validation"


def as_domainnet(root: Path) -> tuple[str, str, str]:
    names = class_names("domainnet")
    for domain in ("clipart", "sketch"):
        paths = write_images(root / domain, names[:5], count=3)
        for part, own in (("train", paths[1:]), ("test", paths[:1])):
            write_list(root / f"{domain}_{part}.txt", f"{domain}/", own, names)
    return "domainnet", "clipart", "sketch"


def as_absolute(root: Path) -> tuple[str, str, str]:
    """Lists with the paths of this machine, images elsewhere than the lists."""
    names = class_names("office-31")
    for domain in ("amazon", "webcam"):
        folder = root.parent / f"{root.name}-else" / domain
        paths = write_images(folder, names)
        write_list(root / f"{domain}.txt", f"{folder}/", paths, names)
    return "office-31", "amazon", "webcam"


@pytest.mark.parametrize(
    "write", [as_cdan, as_dalib, as_ssrt, as_visda, as_domainnet, as_absolute]
)
def test_lists_give_every_image_its_label(
    tmp_path: Path, write: Callable[[Path], tuple[str, str, str]]
) -> None:
    data_set, source, target = write(tmp_path)
    task = load_task(data_set, source, target, tmp_path)
    names = class_names(data_set)
    assert task.classes == DATA_SETS[data_set].classes
    for domain, own in ((task.source, source), (task.target, target)):
        assert f"/{own}/" in domain.paths[0]
        assert len(domain.paths) == (14 if data_set == "domainnet" else task.classes)
        for path, label in zip(domain.paths, domain.labels, strict=True):
            assert Path(path).is_file()
            assert Path(path).parent.name == names[label] == domain.names[label]


def test_a_target_is_tested_on_its_test_list_or_on_itself(tmp_path: Path) -> None:
    domainnet = load_task(*as_domainnet(tmp_path / "domainnet"), tmp_path / "domainnet")
    assert [Path(path).name for path in domainnet.test.paths] == ["00000.jpg"]
    assert "/sketch/" in domainnet.test.paths[0]
    assert not set(domainnet.test.paths) & set(domainnet.target.paths)
    office = load_task(*as_cdan(tmp_path / "office"), tmp_path / "office")
    assert office.test is office.target


@pytest.mark.parametrize(
    ("data_set", "folders", "domains"),
    [
        ("office-31", ("amazon/images", "webcam/images"), ("amazon", "webcam")),
        # As in the archive, with a space.
        ("office-home", ("Art", "Real World"), ("Art", "Real_World")),
        ("visda-2017", ("train", "validation"), ("train", "validation")),
    ],
)
def test_without_lists_the_folders_are_the_classes_in_the_alphabet_s_order(
    tmp_path: Path, data_set: str, folders: tuple[str, ...], domains: tuple[str, str]
) -> None:
    names = class_names(data_set)
    for folder in folders:
        for suffix in (".jpg", ".JPEG", ".png"):
            write_images(tmp_path / folder, names, suffix=suffix)
        (tmp_path / folder / "notes.txt").touch()
        (tmp_path / folder / names[0] / "Thumbs.db").touch()
    task = load_task(data_set, *domains, tmp_path)
    for domain in (task.source, task.target):
        assert len(domain.paths) == 3 * len(names)
        for path, label in zip(domain.paths, domain.labels, strict=True):
            assert Path(path).parent.name == sorted(names)[label]
    assert task.name == f"{data_set}: {domains[0]}-{domains[1]}"


def test_spaces_in_paths_and_empty_lines_are_no_hindrance(tmp_path: Path) -> None:
    names = class_names("office-31")
    for domain in ("amazon", "webcam"):
        folder = tmp_path / "my images" / domain
        write_list(
            tmp_path / f"{domain}.txt",
            f"my images/{domain}/",
            write_images(folder, names),
            names,
        )
    file = tmp_path / "amazon.txt"
    file.write_text(
        f"\n{file.read_text(encoding='utf-8')}\n  \n".replace("jpg ", "jpg \t"),
        encoding="utf-8",
    )
    task = load_task("office-31", "amazon", "webcam", tmp_path)
    assert len(task.source.paths) == 31


def test_a_path_that_is_there_as_it_is_comes_before_its_end(tmp_path: Path) -> None:
    task = as_dalib(tmp_path)
    write_images(tmp_path, class_names("office-home"))
    assert all("/Art/" in path for path in load_task(*task, tmp_path).target.paths)


# Errors.


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        (
            ("amazn", "webcam"),
            "source value: amazn (office-31 has amazon, dslr, webcam",
        ),
        (("amazon", "Art"), "Invalid target value: Art"),
        (("amazon", "amazon"), "Invalid target value: amazon (the source itself)"),
    ],
)
def test_domains_that_there_are_not_are_refused(
    tmp_path: Path, domains: tuple[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_task("office-31", *domains, tmp_path)


@pytest.mark.parametrize("data_set", DATA_SETS)
def test_a_missing_data_set_is_named_with_its_places_and_its_page(
    tmp_path: Path, data_set: str
) -> None:
    known = DATA_SETS[data_set]
    domain, other, *_ = known.domains
    with pytest.raises(FileNotFoundError) as error:
        load_task(data_set, domain, other, tmp_path)
    message = str(error.value)
    assert message.endswith(f"{data_set} can be had from {known.page}")
    for place in known.lists:
        wanted = tmp_path / place.format(domain=domain, part="train")
        assert str(wanted) in message
    if known.folder:
        folder = tmp_path / known.folder.format(domain=domain)
        assert f"no {folder}/CLASS/" in message


def test_a_missing_test_list_of_domainnet_is_named(tmp_path: Path) -> None:
    task = as_domainnet(tmp_path)
    (tmp_path / "sketch_test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*/sketch_test\.txt, no"):
        load_task(*task, tmp_path)


def test_missing_images_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    task = as_cdan(tmp_path)
    names = class_names("office-31")
    for label in (3, 5):
        (tmp_path / "webcam" / "images" / names[label] / "00000.jpg").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_task(*task, tmp_path)
    message = str(error.value)
    assert f"2 of the 31 images in {tmp_path / 'webcam_list.txt'} are" in message
    listed = f"images/webcam/images/{names[3]}/00000.jpg"
    found = tmp_path / f"webcam/images/{names[3]}/00000.jpg"
    assert f"{listed}, as {found}; office-31 can be had" in message


def test_a_list_whose_images_are_elsewhere_is_named_with_the_first(
    tmp_path: Path,
) -> None:
    task = as_cdan(tmp_path)
    (tmp_path / "amazon").rename(tmp_path / "amazon-old")
    with pytest.raises(FileNotFoundError) as error:
        load_task(*task, tmp_path)
    message = str(error.value)
    name = f"amazon/images/{class_names('office-31')[0]}/00000.jpg"
    assert f"{name}, the first image in {tmp_path / 'amazon_list.txt'}" in message
    assert f"missing in {tmp_path}; office-31 can be had from https" in message


@pytest.mark.parametrize(
    "line",
    ["a/b.jpg 31", "a/b.jpg -1", "a/b.jpg one", "a/b.jpg", "a/b.jpg 1.0", "31"],
)
def test_a_line_that_is_no_path_and_label_is_named(tmp_path: Path, line: str) -> None:
    task = as_cdan(tmp_path)
    file = tmp_path / "webcam_list.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[4] = line
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"webcam_list\.txt, line 5: must be") as error:
        load_task(*task, tmp_path)
    assert f"from 0 to 30, as in office-31, got {line!r}" in str(error.value)


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    task = as_cdan(tmp_path)
    (tmp_path / "amazon_list.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"amazon_list\.txt is empty; office-31 can"):
        load_task(*task, tmp_path)


def test_a_list_or_folder_that_lacks_a_class_is_refused(tmp_path: Path) -> None:
    task = as_cdan(tmp_path)
    file = tmp_path / "amazon_list.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text(
        "\n".join(line for line in lines if not line.endswith(" 7")), encoding="utf-8"
    )
    message = r"amazon_list\.txt has no image of the class 7, but office-31 has 31"
    with pytest.raises(ValueError, match=message):
        load_task(*task, tmp_path)
    file.unlink()
    folder = tmp_path / "amazon" / "images"
    (folder / "class_007" / "00000.jpg").unlink()
    with pytest.raises(ValueError, match="images has no image of the class 7, but"):
        load_task(*task, tmp_path)
    (folder / "class_007").rmdir()
    message = "images has 30 folders, but office-31 has 31 classes; office-31 can be"
    with pytest.raises(ValueError, match=message):
        load_task(*task, tmp_path)


def test_a_label_of_two_classes_and_a_class_of_two_labels_are_refused(
    tmp_path: Path,
) -> None:
    task = as_cdan(tmp_path)
    names = class_names("office-31")
    file = tmp_path / "amazon_list.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    other = lines[4].replace(" 4", " 9")
    file.write_text("\n".join([*lines, other]), encoding="utf-8")
    message = f"the label 9 is of {names[9]} and of {names[4]}"
    with pytest.raises(ValueError, match=message):
        load_task(*task, tmp_path)
    lines[9] = other
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match="a class has several labels"):
        load_task(*task, tmp_path)


@pytest.mark.parametrize("role", ["source", "target"])
def test_labels_that_mean_other_classes_in_the_target_are_refused(
    tmp_path: Path, role: str
) -> None:
    """CDAN's lists of Office-Home do not count in the order of the alphabet."""
    write_office31(tmp_path)
    list_office31(tmp_path, "amazon" if role == "source" else "webcam")
    with pytest.raises(ValueError, match=r"the label 1 is class_00.* but class_00"):
        load_task("office-31", "amazon", "webcam", tmp_path)


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_labels_of_both_lists_of_a_target_must_agree(
    tmp_path: Path, part: str
) -> None:
    task = as_domainnet(tmp_path)
    file = tmp_path / f"sketch_{part}.txt"
    swapped = {" 0\n": " 1\n", " 1\n": " 0\n"}
    text = re.sub(
        " [01]\n", lambda found: swapped[found[0]], file.read_text(encoding="utf-8")
    )
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"but .* in .*sketch_{part}\.txt"):
        load_task(*task, tmp_path)


# Images.


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *(("RGB", ".png"), ("RGBA", ".png"), ("P", ".png"), ("CMYK", ".jpg")),
        *(("RGB", ".jpg"), ("L", ".png"), ("L", ".jpg"), ("LA", ".png"), ("1", ".png")),
    ],
)
def test_images_of_every_mode_are_read_as_red_green_and_blue(
    tmp_path: Path, mode: str, suffix: str
) -> None:
    white_and_red = Image.new("RGB", (48, 16), (255, 255, 255))
    white_and_red.paste((255, 0, 0), (16, 0, 48, 16))
    path = str(tmp_path / f"image{suffix}")
    white_and_red.convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (3, 16, 48)
    assert image.dtype == torch.uint8
    white, red = image[:, :, :8].int(), image[:, :, 24:].int()
    # JPEG is not exact, and in grey, red is 76; in black and white, it is dithered.
    assert (white - 255).abs().max() <= 6
    if mode == "1":
        assert set(red.flatten().tolist()) == {0, 255}
        return
    level = (76, 76, 76) if mode in ("L", "LA") else (255, 0, 0)
    assert (red - torch.tensor(level).view(3, 1, 1)).abs().max() <= 6


def test_transparent_pixels_show_the_color_beneath(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    path = str(tmp_path / "palette.png")
    # Levels for several entries: Pillow warns unless such a palette becomes RGBA first.
    image.save(path, transparency=bytes([255, 100]))
    expected = torch.tensor([10, 20, 30], dtype=torch.uint8)
    assert read_image(path)[:, 1, 2].equal(expected)
    path = str(tmp_path / "rgba.png")
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(path)
    assert read_image(path)[:, 1, 2].equal(expected)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_image_that_cannot_be_read_is_named(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "broken.jpg"
    if content is None:  # cut off
        Image.effect_noise((64, 64), 50).save(path)
        content = path.read_bytes()[:400]
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"broken\.jpg cannot be read as an image"):
        read_image(str(path))


# Views.


def ramp() -> Tensor:
    """An image that says in red where a pixel is from left, in green from the top."""
    across = torch.arange(256, dtype=torch.uint8).expand(256, 256)
    return torch.stack([across, across.T, torch.zeros_like(across)])


def test_random_views_are_crops_of_every_place_and_every_other_is_mirrored() -> None:
    found = []
    for seed in range(400):
        view = random_view(ramp(), seed)
        assert view.shape == (3, CROP, CROP)
        assert view.dtype == torch.uint8
        left, top = int(view[0].min()), int(view[1].min())
        mirrored = bool(view[0, 0, 0] > view[0, 0, -1])
        expected = ramp()[:, top : top + 224, left : left + 224]
        assert view.equal(expected.flip(2) if mirrored else expected)
        found.append((top, left, mirrored))
    tops, lefts, flips = zip(*found, strict=True)
    assert set(tops) == set(lefts) == set(range(33))
    assert 150 < sum(flips) < 250
    assert len({(top, left) for top, left, _ in found}) > 200  # not tied to each other


def test_a_random_view_is_that_of_its_seed() -> None:
    assert random_view(ramp(), 2**61).equal(random_view(ramp(), 2**61))
    state = torch.get_rng_state()
    random_view(ramp(), 0)
    assert torch.get_rng_state().equal(state)


def test_the_center_view_is_the_middle() -> None:
    assert center_view(ramp()).equal(ramp()[:, 16:240, 16:240])


@pytest.mark.parametrize("size", [(100, 300), (512, 400)])
def test_images_are_resized_as_pillow_does(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
    pillow = Image.frombytes(
        "RGB", (size[1], size[0]), bytes(image.permute(1, 2, 0).flatten().tolist())
    )
    small = pillow.resize((256, 256), Image.Resampling.BILINEAR).crop(
        (16, 16, 240, 240)
    )
    expected = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    difference = center_view(image).int() - expected.view(224, 224, 3).permute(2, 0, 1)
    assert difference.abs().max() <= 1


def test_images_are_normalized_as_for_imagenet() -> None:
    images = torch.tensor([[0, 255], [51, 102], [255, 0]], dtype=torch.uint8)
    result = normalize(images.view(1, 3, 1, 2))
    literal = [
        [(0 - 0.485) / 0.229, (1 - 0.485) / 0.229],
        [(0.2 - 0.456) / 0.224, (0.4 - 0.456) / 0.224],
        [(1 - 0.406) / 0.225, (0 - 0.406) / 0.225],
    ]
    torch.testing.assert_close(result, torch.tensor(literal).view(1, 3, 1, 2))


# Batches.


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Two domains, 12 classes, 1 image and 2 images of each; grey is the class."""
    root = tmp_path_factory.mktemp("visda")
    write_images(root / "train", list(VISDA), suffix=".png")
    write_images(root / "validation", list(VISDA), count=2, suffix=".png")
    return load_task("visda-2017", "train", "validation", root)


@pytest.fixture(scope="module")
def large(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Task:
    """The same with noise for images, so that crops differ."""
    root = tmp_path_factory.mktemp("noise")
    paths = []
    for number in range(12):
        paths.append(str(root / f"{number}.png"))
        Image.effect_noise((40, 30), 80).save(paths[-1])
    noise = Domain(root, paths, list(range(12)), task.source.names)
    return task._replace(source=noise, target=noise, test=noise)


# torch warns of two workers on a machine of one core.
on_one_core = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker")


def same(one: Batch, two: Batch) -> bool:
    return all(a.equal(b) for a, b in zip(one, two, strict=True))


def classes(images: Tensor) -> list[int]:
    return (255 - images[:, 0, 0, 0].int()).tolist()


@pytest.mark.slow
@on_one_core
def test_batches_depend_on_the_seed_and_not_on_workers_or_the_global_state(
    large: Task,
) -> None:
    first = list(batches(large, 4, 5, seed=1))
    torch.rand(3)  # what a method draws in between
    for workers in (0, 2):
        again = list(batches(large, 4, 5, seed=1, workers=workers))
        assert all(same(a, b) for a, b in zip(first, again, strict=True))
    other = list(batches(large, 4, 5, seed=2))
    assert not any(same(a, b) for a, b in zip(first, other, strict=True))


def test_reading_leaves_the_global_state_as_it_is(large: Task) -> None:
    state = torch.get_rng_state()
    list(batches(large, 4, 3, seed=1))
    list(ordered_batches(large.test, 4))
    assert torch.get_rng_state().equal(state)


def test_the_domains_are_shuffled_apart_and_cropped_anew(large: Task) -> None:
    """Here they are the same images, and the batches are whole epochs."""
    first, second = list(batches(large, 12, 2, seed=0))
    assert not first.source.equal(first.target)
    rows = [
        dict(zip(one.labels.tolist(), one.source, strict=True))
        for one in (first, second)
    ]
    assert any(not rows[0][label].equal(rows[1][label]) for label in range(12))


def test_an_epoch_shows_every_image_once_with_its_label(task: Task) -> None:
    stream = list(batches(task, 4, 6, seed=0))
    for epoch in (stream[:3], stream[3:]):
        labels = [label for batch in epoch for label in batch.labels.tolist()]
        assert sorted(labels) == list(range(12))
        assert labels == [one for batch in epoch for one in classes(batch.source)]
    shown = [one for batch in stream for one in classes(batch.target)]
    assert sorted(shown) == sorted(2 * list(range(12)))
    assert stream[0].source.dtype == torch.uint8
    assert stream[0].source.shape == stream[0].target.shape == (4, 3, 224, 224)


def test_a_batch_that_a_domain_cannot_fill_is_refused(task: Task) -> None:
    with pytest.raises(ValueError, match=r"batch size value: 13 \(of 12 images\)"):
        next(batches(task, 13, 1, seed=0))


@on_one_core
@pytest.mark.parametrize("workers", [0, 2])
def test_the_evaluation_sees_all_images_in_order(task: Task, workers: int) -> None:
    stream = list(ordered_batches(task.test, 10, workers))
    assert [len(images) for images, _ in stream] == [10, 10, 4]
    labels = torch.cat([labels for _, labels in stream]).tolist()
    assert labels == task.test.labels
    assert [one for images, _ in stream for one in classes(images)] == labels


def test_the_evaluation_sees_center_views(large: Task) -> None:
    images, _ = next(ordered_batches(large.test, 3))
    assert images[2].equal(center_view(read_image(large.test.paths[2])))
