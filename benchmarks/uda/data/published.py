"""MNIST and USPS as MCD and DWL had them: a few random images, and USPS cut anew.

Of both the code was read (``classification/datasets`` of ``mil-tokyo/MCD_DA`` at af10217,
the same files in ``NiXiao-cqu/TransferLearning-dwl-cvpr2021`` at 525aab8). What it says:

* 28x28, values in [-1, 1].
* 2000 random training images of MNIST and 1800 of USPS, drawn anew in each run.
* USPS is CoGAN's ``usps_28x28.pkl``: all 9298 images, cut into 7438 and 1860. That file was
  not at hand, so which images are in its test is not known; here a fixed permutation cuts
  them. USPS's own test set of 2007 is the harder one: other people wrote it.
* The 10 000 test images of MNIST.

How the images of USPS became larger is not said. CoGAN's older code reads them from a
folder ``padded_images`` (``cogan/models/mnist2usps`` of ``mingyuliutw/CoGAN``), and a margin
decides how far the domains are apart. MCD's paper has 76.7 and 63.4 % for its network trained
on the source alone, from MNIST to USPS and back (its Table 1, from memory: the paper was not
at hand). With images that fill their frame that network comes to about 50 and 58, with a
margin of 2 pixels to 67 and 70, of 3 to 75 and 76, of 4 to 81 and 80 (600 to 900 steps of one
or two seeds; ``--methods source-only`` trains it). So it is 3 here. (Two
short runs of MCD had been seen before, with margins of 0 and 4.)

Of MNIST's 60 000 training images the published code knows 55 000.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.digits import Split
from benchmarks.uda.data import LARGE, REAL, Task, load_task, read_domain

TASKS = REAL[:2]
COUNTS = {"mnist": 2000, "usps": 1800}
"""How many training images there are in a run."""

USPS_TEST = 1860
MARGINS = {"mnist": 0, "usps": 3}
"""Black pixels around an image, which is scaled to the rest."""


def load_published(name: str, directory: Path) -> Task:
    """Load ``usps-mnist`` or ``mnist-usps``, with all training images.

    Raises:
        ValueError, FileNotFoundError, ImportError: as ``load_task`` with ``exact`` does.
    """
    if name not in TASKS:
        raise ValueError(f"Invalid task value: {name}")
    source_name, target_name = name.split("-")
    source, validation = _read(source_name, directory)
    target, test = _read(target_name, directory)
    return Task(name, source, target.images, test, validation)


def load_whole(name: str, directory: Path) -> Task:
    """Load a task as CDAN+E's code has it: images that fill their frame, cut as usual.

    All training images of both domains; ``data/usps2mnist`` of ``thuml/CDAN`` lists 7291
    and 2007 of USPS.

    Raises:
        ValueError, FileNotFoundError, ImportError: as ``load_task`` with ``exact`` does.
    """
    return load_task(name, directory, LARGE, exact=True)


def draw(task: Task, seed: int) -> Task:
    """Draw a run's training images, ``COUNTS`` of each domain or all if there are fewer.

    Depends on the arguments alone, not on the global random state. Test and validation
    stay.
    """
    generator = torch.Generator().manual_seed(seed)
    source_count, target_count = (COUNTS[name] for name in task.name.split("-"))

    def rows(images: Tensor, count: int) -> Tensor:
        return torch.randperm(len(images), generator=generator)[:count]

    chosen = rows(task.source.images, source_count)
    source = Split(*(part[chosen] for part in task.source))
    return replace(
        task, source=source, target=task.target[rows(task.target, target_count)]
    )


def _read(name: str, directory: Path) -> tuple[Split, Split]:
    size = LARGE - 2 * MARGINS[name]
    train, test, _ = read_domain(name, directory, size, exact=True)
    if name != "usps":
        return train, test
    images, labels = (torch.cat(parts) for parts in zip(train, test, strict=True))
    images = F.pad(images, (MARGINS[name],) * 4, value=-1)  # black
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    test_rows, rows = order[:USPS_TEST], order[USPS_TEST:]
    return Split(images[rows], labels[rows]), Split(
        images[test_rows], labels[test_rows]
    )
