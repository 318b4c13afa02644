"""Every Python block of the README runs, in order, in one namespace, on two ranks."""

import re
from pathlib import Path

from tests.ranks import run_on_ranks

README = Path(__file__).parents[1] / "README.md"


def run_the_readme() -> int:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    exec(compile("\n".join(blocks), str(README), "exec"), {})
    return len(blocks)


def test_the_readme_runs() -> None:
    assert all(blocks > 3 for blocks in run_on_ranks(2, run_the_readme, timeout=None))
