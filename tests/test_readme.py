"""Every Python block of the README runs, in order, in one namespace, on two ranks."""

import os
import re
from pathlib import Path

from ghopt import Recording
from tests.ranks import run_on_ranks

README = Path(__file__).parents[1] / "README.md"


def run_the_readme(directory: Path) -> int:
    os.chdir(directory)
    blocks = re.findall(
        r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    exec(compile("\n".join(blocks), str(README), "exec"), {})
    return len(blocks)


def test_the_readme_runs(tmp_path: Path) -> None:
    counts = run_on_ranks(2, run_the_readme, tmp_path, timeout=None)
    assert all(blocks > 4 for blocks in counts)
    recording = Recording.from_jsonl(tmp_path / "run.jsonl")
    assert recording.names == ("up", "down")
    assert recording.conflicts.any()
