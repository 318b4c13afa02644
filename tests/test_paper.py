"""The page on the paper: its proofs hold, its counts are those of the runs."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

from benchmarks.uda import verdict

PAGE = Path(__file__).parents[1] / "docs" / "paper.rst"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = [
    textwrap.dedent(block)
    for block in re.findall(
        r"^\.\. code-block:: python\n\n((?: {3}.*\n|\n)+)", TEXT, re.MULTILINE
    )
]


def test_every_block_runs_in_order() -> None:
    assert len(BLOCKS) == TEXT.count("code-block:: python") > 6
    assert all("assert " in block for block in BLOCKS[1:])
    with torch.random.fork_rng():
        exec(compile("\n".join(BLOCKS), str(PAGE), "exec"), {})


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("math.pi - theta", "theta"),
        ("assert close(angle(first, second), theta)", "assert close(theta, 0.0)"),
        ("n1 / n2 * math.sin(turn1)", "n2 / n1 * math.sin(turn1)"),
        ("math.tan(turn1) - n1 / n2", "math.tan(turn1) - n2 / n1"),
        ("math.atan2(n1, n2)", "math.atan2(n2, n1)"),
        ("[101.0]", "[1.0]"),
    ],
)
def test_a_wrong_formula_fails(right: str, wrong: str) -> None:
    code = "\n".join(BLOCKS)
    assert code.count(right) == 1
    with pytest.raises(AssertionError), torch.random.fork_rng():
        exec(compile(code.replace(right, wrong), str(PAGE), "exec"), {})


def test_the_counts_at_the_best_step_are_those_of_the_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    verdict.main(["--best"])
    quoted = textwrap.indent(capsys.readouterr().out, "   ")
    assert f".. code-block:: text\n\n{quoted}\n" in TEXT


def test_pictures_are_there_with_words_for_who_does_not_see_them() -> None:
    pictures = re.findall(r"^\.\. image:: (.*)\n   :alt: (.*)$", TEXT, re.MULTILINE)
    assert len(pictures) == TEXT.count("image::") > 2
    for path, words in pictures:
        assert (PAGE.parent / path).is_file()
        assert len(words) > 60
