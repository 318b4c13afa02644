"""Pages of Markdown: their blocks of code run, and print what the page shows."""

import os
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).parents[1]
_CODE = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
_PRINTED = re.compile(r"(?:(?!^```).)*?^```text\n(.*?)^```\n", re.DOTALL | re.MULTILINE)


def name_of(path: Path) -> str:
    """Name a page in a test's id."""
    return path.relative_to(ROOT).as_posix()


def run_page(path: Path, directory: Path) -> int:
    """Run the blocks of a page in order, in one namespace and in a directory.

    A block of text after one of Python, with at most words between, is what that prints.

    Returns:
        The number of blocks.

    Raises:
        AssertionError: if a block prints something else than the page shows.
    """
    os.chdir(directory)
    text = path.read_text(encoding="utf-8")
    blocks = [*_CODE.finditer(text)]
    ends = [block.start() for block in blocks[1:]] + [len(text)]
    names: dict[str, object] = {"__name__": "page"}
    for block, end in zip(blocks, ends, strict=True):
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(block[1], str(path), "exec"), names)
        shown = _PRINTED.match(text[block.end() : end])
        wanted = shown[1] if shown else ""
        if printed.getvalue() != wanted:
            raise AssertionError(f"{block[1]}prints\n{printed.getvalue()}")
    return len(blocks)


def pictures_of(path: Path) -> dict[str, str]:
    """Give the pictures of a page, by path, and the words for who does not see them."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"!\[([^]]*)\]\(([^)]*)\)", text)
    assert len(found) == text.count("![")
    return {place: words for words, place in found}


def files_named(path: Path) -> set[str]:
    """Give the files of the project that a page names in code font."""
    text = path.read_text(encoding="utf-8")
    places = (
        r"`((?:benchmarks|docs|examples|tests)/[\w/-]+(?:\.\w+)?|[A-Z]+\.(?:md|cff))`"
    )
    scripts = {f"examples/{one}" for one in re.findall(r"`(\w+\.py)`", text)}
    return {*re.findall(places, text)} | scripts
