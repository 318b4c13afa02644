"""Office-31, Office-Home, VisDA-2017 and DomainNet: their files, as published.

A list has lines ``path label``, as those of CDAN, of DALIB (now tllib) and of DomainNet
itself; where there is none, each class has its folder. Nothing is fetched: an error says
what is missing and where it can be had.
"""

import os
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".jpg", ".jpeg", ".png")


class DataSet(NamedTuple):
    """What is known of a data set.

    Attributes:
        domains: their names.
        classes: how many.
        page: where the official one is.
        lists: where a domain's list may be; those with a ``{part}`` have one for
            training and one for the test.
        folder: where the folders of its classes are if there is no list; None if it
            has no such layout.
        whole: whether every list has every class. Those of DomainNet have not: there
            is no t-shirt in ``painting_train.txt``, for one.
    """

    domains: tuple[str, ...]
    classes: int
    page: str
    lists: tuple[str, ...]
    folder: str | None
    whole: bool = True


_LISTS = ("{domain}_list.txt", "{domain}.txt", "image_list/{domain}.txt")

DATA_SETS = {
    "office-31": DataSet(
        ("amazon", "dslr", "webcam"),
        31,
        "https://faculty.cc.gatech.edu/~judy/domainadapt/",
        _LISTS,
        "{domain}/images",
    ),
    "office-home": DataSet(
        ("Art", "Clipart", "Product", "Real_World"),
        65,
        "https://www.hemanthdv.org/officeHomeDataset.html",
        _LISTS,
        "{domain}",
    ),
    "visda-2017": DataSet(
        ("train", "validation"),
        12,
        "https://ai.bu.edu/visda-2017/",
        ("{domain}/image_list.txt", *_LISTS),
        "{domain}",
    ),
    "domainnet": DataSet(
        ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
        345,
        "https://ai.bu.edu/M3SDA/",
        ("{domain}_{part}.txt", "image_list/{domain}_{part}.txt"),
        None,
        whole=False,
    ),
}


class Domain(NamedTuple):
    """Images of a domain, not yet read.

    Attributes:
        origin: the list or folder that they are from.
        paths: of the images.
        labels: of the images, from 0.
        names: of the classes that occur, by label: their folders.
    """

    origin: Path
    paths: list[str]
    labels: list[int]
    names: dict[int, str]


class Task(NamedTuple):
    """One adaptation problem.

    Attributes:
        name: ``"data set: source-target"``.
        classes: how many.
        source: labeled images.
        target: images whose labels training does not see.
        test: what the evaluation reads: ``target`` itself, as is usual, or the test
            list of the target domain, where there is one.
    """

    name: str
    classes: int
    source: Domain
    target: Domain
    test: Domain


def load_task(data_set: str, source: str, target: str, root: Path) -> Task:
    """Find the images of a task; reads their lists, but no image.

    Args:
        data_set: a key of ``DATA_SETS``.
        source: one of its domains.
        target: another one.
        root: the folder of the data set.

    Raises:
        ValueError: if there are no such domains, if a list is not one of this data
            set, or if the labels of the two domains do not mean the same classes.
        FileNotFoundError: if lists, folders or images are missing; names them, and
            where they can be had.
    """
    known = DATA_SETS[data_set]
    for role, domain in (("source", source), ("target", target)):
        if domain not in known.domains:
            raise ValueError(
                f"Invalid {role} value: {domain} ({data_set} has "
                f"{', '.join(known.domains)})"
            )
    if source == target:
        raise ValueError(f"Invalid target value: {target} (the source itself)")
    seen = _load_domain(data_set, source, root, "train")
    unseen = _load_domain(data_set, target, root, "train")
    parted = any("{part}" in one for one in known.lists)
    test = _load_domain(data_set, target, root, "test") if parted else unseen
    for other in (unseen, test):
        _check_agreement(seen, other)
    name = f"{data_set}: {source}-{target}"
    return Task(name, known.classes, seen, unseen, test)


def _load_domain(data_set: str, domain: str, root: Path, part: str) -> Domain:
    """Find a domain's images by its list, else by the folders of its classes."""
    known = DATA_SETS[data_set]
    # Office-Home's archive has "Real World", its lists have "Real_World".
    spellings = (domain, domain.replace("_", " "))
    lists = [root / one.format(domain=domain, part=part) for one in known.lists]
    folders = [root / (known.folder or "").format(domain=one) for one in spellings]
    for file in lists:
        if file.is_file():
            paths, labels = _read_list(file, data_set, root)
            return _name_classes(file, paths, labels, data_set)
    for folder in folders if known.folder else []:
        if folder.is_dir():
            return _read_folders(folder, data_set)
    wanted = [str(file) for file in lists]
    if known.folder:
        wanted.append(f"{folders[0]}/CLASS/")
    raise FileNotFoundError(
        f"{domain} is missing: there is no {', no '.join(wanted)}; {_fetch(data_set)}"
    )


def _read_list(file: Path, data_set: str, root: Path) -> tuple[list[str], list[int]]:
    classes = DATA_SETS[data_set].classes
    names, labels = [], []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, *label = line.rsplit(maxsplit=1)
        if not (label and label[0].isdecimal() and int(label[0]) < classes):
            raise ValueError(
                f"{file}, line {number}: must be a path and a label from 0 to "
                f"{classes - 1}, as in {data_set}, got {line!r}"
            )
        names.append(name.strip())
        labels.append(int(label[0]))
    if not names:
        raise ValueError(f"{file} is empty; {_fetch(data_set)}")
    base, skipped = _find_base(file, names[0], data_set, root)
    paths = [str(base.joinpath(*Path(name).parts[skipped:])) for name in names]
    missing = [row for row, path in enumerate(paths) if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(paths)} images in {file} are missing, the "
            f"first is {names[missing[0]]}, as {paths[missing[0]]}; {_fetch(data_set)}"
        )
    return paths, labels


def _find_base(file: Path, name: str, data_set: str, root: Path) -> tuple[Path, int]:
    """Find the folder of a list's paths, and how many of their parts come before it.

    Those of CDAN's lists begin with the folders of their authors' machine.
    """
    parts = Path(name).parts
    for skipped in range(len(parts)):
        for base in (root, file.parent):
            if base.joinpath(*parts[skipped:]).is_file():
                return base, skipped
    raise FileNotFoundError(
        f"{name}, the first image in {file}, is missing in {root}; {_fetch(data_set)}"
    )


def _read_folders(folder: Path, data_set: str) -> Domain:
    classes = DATA_SETS[data_set].classes
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if len(names) != classes:
        raise ValueError(
            f"{folder} has {len(names)} folders, but {data_set} has {classes} "
            f"classes; {_fetch(data_set)}"
        )
    paths, labels = [], []
    for label, name in enumerate(names):
        found = sorted(
            str(entry)
            for entry in (folder / name).iterdir()
            if entry.suffix.lower() in SUFFIXES
        )
        paths += found
        labels += [label] * len(found)
    return _name_classes(folder, paths, labels, data_set)


def _name_classes(
    origin: Path, paths: list[str], labels: list[int], data_set: str
) -> Domain:
    """Take the classes' names from the images' folders, one name for each label."""
    known = DATA_SETS[data_set]
    names: dict[int, str] = {}
    for path, label in zip(paths, labels, strict=True):
        name = Path(path).parent.name
        if names.setdefault(label, name) != name:
            raise ValueError(
                f"{origin}: the label {label} is of {names[label]} and of {name}"
            )
    if len(set(names.values())) < len(names):
        raise ValueError(f"{origin}: a class has several labels: {names}")
    absent = [label for label in range(known.classes) if label not in names]
    if absent and known.whole:
        raise ValueError(
            f"{origin} has no image of the class {absent[0]}, but {data_set} has "
            f"{known.classes} classes; {_fetch(data_set)}"
        )
    return Domain(origin, paths, labels, names)


def _check_agreement(source: Domain, other: Domain) -> None:
    for label, name in other.names.items():
        if source.names.get(label, name) != name:
            raise ValueError(
                f"the label {label} is {source.names[label]} in {source.origin}, but "
                f"{name} in {other.origin}: take both from one place"
            )


def _fetch(data_set: str) -> str:
    return f"{data_set} can be had from {DATA_SETS[data_set].page}"
