"""The machine and the versions that figures hold for."""

import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PEERS = ("torchjd", "pytorch_optimizer", "conflictfree")
"""What the benchmarks compare with."""


def environment(
    device: torch.device, packages: Iterable[str] = PEERS
) -> dict[str, str]:
    """Name the machine, and the versions of Python, torch and some packages."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {package: _version(package) for package in packages}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": chip,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
    }


def _processor() -> str:
    """Name the processor; platform does not know it on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
