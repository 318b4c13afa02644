"""Every Python block of the README runs, in order, in one namespace, on two ranks.

It is also the page that a package index shows, where links to files lead nowhere.
"""

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


def test_links_work_wherever_the_readme_is_shown() -> None:
    # But for pictures, which a package index leaves out: their words say what they show.
    links = re.findall(
        r"(?<!!)\[[^]]*\]\(([^)]*)\)", README.read_text(encoding="utf-8")
    )
    assert links
    for link in links:
        assert link.startswith("https://"), link


def test_files_that_the_readme_names_are_there() -> None:
    text = README.read_text(encoding="utf-8")
    pages = re.findall(r"`(benchmarks/[\w/]+\.md|docs/\w+\.rst)`", text)
    scripts = re.findall(r"`(?:examples/)?(\w+\.py)`", text)
    assert len(pages) > 4
    assert len(scripts) > 15
    pictures = re.findall(r"!\[[^]]{20,}\]\(([^)]*)\)", text)
    assert len(pictures) == text.count("![") > 0
    for path in [*pages, *pictures, *(f"examples/{script}" for script in scripts)]:
        assert (README.parent / path).is_file(), path
