"""What the commands that train on digits share: which digits, and for how long."""

import argparse
from pathlib import Path

import torch

from benchmarks.uda.data import DEMO, REAL, SVHN

DEMO_STEPS = 300
REAL_STEPS = 1000


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add ``--data``."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help=f"folder of mnist.npz and usps.npz, for the tasks {' and '.join(REAL[:2])}; "
        f"for {SVHN} also of train_32x32.mat and test_32x32.mat",
    )


def add_task(parser: argparse.ArgumentParser) -> None:
    """Add ``--data`` and ``--task``, which :func:`find_task` reads."""
    add_data(parser)
    parser.add_argument(
        "--task",
        choices=[DEMO, *REAL],
        help=f"source-target (default: {REAL[0]} with --data, else {DEMO})",
    )


def find_task(options: argparse.Namespace) -> tuple[str, int]:
    """Return the name of the task that is asked for, and its usual number of steps."""
    name: str = options.task or (REAL[0] if options.data else DEMO)
    return name, DEMO_STEPS if name == DEMO else REAL_STEPS


def add_trade_offs(
    parser: argparse.ArgumentParser, default: list[float] | None, usual: str
) -> None:
    """Add ``--trade-offs``; ``usual`` says what ``default`` means."""
    parser.add_argument(
        "--trade-offs",
        nargs="+",
        type=float,
        default=default,
        metavar="X",
        help=f"weights of the alignment loss, for each rule (default: {usual})",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, on which networks and images will be."""
    parser.add_argument(
        "--device", type=_device, default="cpu", help="such as cuda (default: cpu)"
    )


def _device(text: str) -> torch.device:
    """Read a device that can be used, for ``argparse``."""
    try:
        return torch.empty(0, device=text).device
    except (AssertionError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"invalid value: {text} ({first})") from error
