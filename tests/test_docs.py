"""The pages of the documentation: their code runs and prints what they show.

A block of text right after one of Python is what that prints. The page on troubleshooting
has all messages that give a reason, and none that is not in the source.
"""

import ast
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.uda import verdict
from benchmarks.uda.__main__ import elsewhere
from ghopt import Weighting, gh, ghpp, ghpp_balanced, ghpp_printed, plain_sum
from ghopt.plots import PLOTS
from tests.pages import ROOT, files_named, name_of, pictures_of, run_page
from tests.ranks import run_on_ranks

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ON_RANKS = DOCS / "guides" / "processes.md"
WITH_CODE = [path for path in PAGES if "```python" in path.read_text("utf-8")]


# torch's advice on second derivatives, which the page follows.
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize(
    "path", [path for path in WITH_CODE if path != ON_RANKS], ids=name_of
)
def test_code_runs_and_prints_what_the_page_shows(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        run_page(path, tmp_path)


def test_code_for_several_processes_runs_on_two(tmp_path: Path) -> None:
    counts = run_on_ranks(2, run_page, ON_RANKS, tmp_path, timeout=None)
    assert counts == [2, 2]


def test_most_guides_have_code() -> None:
    guides = [path for path in PAGES if path.parent.name == "guides"]
    assert len({*guides} & {*WITH_CODE}) > len(guides) / 2


# Words and pictures


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_what_a_page_shows_and_names_is_there(path: Path) -> None:
    for place, words in pictures_of(path).items():
        assert (path.parent / place).is_file()
        assert len(words) > 60
    for place in files_named(path):
        assert (ROOT / place).exists(), place


def anchors_of(path: Path) -> set[str]:
    """Give the anchors of a page's headings, as sites that show Markdown make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    bare = [re.sub(r"[^\w -]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in bare}


@pytest.mark.parametrize(
    "path", [*ROOT.glob("benchmarks/*/README.md"), *PAGES], ids=name_of
)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, heading = link.partition("#")
        if not place.startswith("https://"):
            target = (path.parent / place) if place else path
            assert target.is_file(), link
            assert not heading or heading in anchors_of(target), link


def test_every_recipe_is_named_in_the_guides() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    scripts = [path.name for path in (ROOT / "examples").glob("*.py")]
    for script in {*scripts} - {"__init__.py", "problem.py"}:
        assert re.search(rf"`(?:examples/)?{script}`", text), script


def test_the_gallery_shows_every_plot_in_a_file_of_its_own() -> None:
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    drawn = re.findall(r"^   plots\.(\w+)\(recording, axes\)$", text, re.MULTILINE)
    assert drawn == [plot.__name__ for plot in PLOTS.values()]
    # Without a name, the last one would be shown in the place of all.
    assert drawn == re.findall(r":filename-prefix: gallery-(\w+)\n", text)
    assert len(re.findall(r":alt: .{60,}", text)) == len(drawn)


# Troubleshooting

TROUBLE = DOCS / "troubleshooting.md"
QUOTES = re.findall(r"^\*\*`(.*)`\*\*$", TROUBLE.read_text("utf-8"), re.MULTILINE)


def text_of(node: ast.expr) -> str:
    """Give the text of a string, with ``...`` for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "..."


def raised(tree: ast.AST) -> Iterator[str]:
    """Give the messages of a module's errors and warnings."""
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node
        if isinstance(call, ast.Call) and call.args:
            function = ast.unparse(call.func)
            if isinstance(node, ast.Raise) or function == "warnings.warn":
                yield text_of(call.args[0])


TREES = [ast.parse(path.read_text("utf-8")) for path in ROOT.glob("ghopt/**/*.py")]
STRINGS = [
    text_of(node)
    for tree in TREES
    for node in ast.walk(tree)
    if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)
]
REASONED = [
    message
    for tree in TREES
    for message in raised(tree)
    if re.search(r"[\w ][:;.?] \w", message.replace("...", ""))
]


def quotes(quote: str, message: str) -> bool:
    """Tell whether a message is quoted: in order, with gaps where values go."""
    parts = [re.escape(part) for part in quote.split("...")]
    return re.search(".*".join(parts), message, re.DOTALL) is not None


def test_each_message_on_the_page_is_in_the_source() -> None:
    assert len(QUOTES) > 60
    for quote in QUOTES:
        assert any(quotes(quote, string) for string in STRINGS), quote


def test_each_message_that_gives_a_reason_is_on_the_page() -> None:
    assert len(REASONED) > 50
    missing = [
        message
        for message in REASONED
        if not any(quotes(quote, message) for quote in QUOTES)
    ]
    assert not missing


def test_each_message_on_the_page_has_a_cure() -> None:
    text = TROUBLE.read_text(encoding="utf-8")
    assert len(re.findall(r"^\*\*`.*`\*\*\n: \S", text, re.MULTILINE)) == len(QUOTES)


# Help


@pytest.mark.parametrize("rule", [gh, ghpp, ghpp_balanced, ghpp_printed, plain_sum])
def test_help_on_a_rule_begins_with_what_it_does(rule: Weighting) -> None:
    first, _, rest = (rule.__doc__ or "").partition("\n")
    assert first.split()[0] in ("Weigh", "Weights")
    assert "see" not in first.split()
    assert "Returns:" in rest or rule is plain_sum


def test_formulas_of_help_are_those_of_the_rules() -> None:
    g = torch.tensor([[1.0, 0.0], [-1.5, 1.0]], dtype=torch.float64)
    names: dict[str, Any] = {name: getattr(math, name) for name in ("sin", "cos")}
    n0, n1 = g.norm(dim=1).tolist()
    product, lam = float(g[0] @ g[1]), 0.3
    phi = math.acos(product / n0 / n1) - math.pi / 2
    names |= {
        "phi": phi,
        "lam": lam,
        "b0": lam * phi,
        "b1": (1 - lam) * phi,
        "r": n0 / n1,
    }
    names |= {"product": product, "n0": n0, "n1": n1}
    turned, printed = partial(ghpp, lam=lam), partial(ghpp_printed, lam=lam)
    for rule, found in ((gh, gh), (ghpp, turned), (ghpp_printed, printed)):
        (line,) = re.findall(r"::\n\n +(.*  and  .*)\n", rule.__doc__ or "")
        line = line.replace("g_0 . g_1", "product").replace("cos phi", "cos(phi)")
        line = re.sub(r"\|g_(\d)\|", r"n\1", line)
        line = re.sub(r"(sin|cos) (b\d)", r"\1(\2)", line)
        weights = [eval(formula, names) for formula in line.split("  and  ")]
        assert found(g @ g.T).tolist() == pytest.approx(weights)


# Figures


COUNTS = [
    "none",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
]


def test_counts_of_gains_and_losses_are_those_of_the_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    verdict.main([])
    said = capsys.readouterr().out
    rows = re.findall(r"^(gh|ghpp) +10 +(\d+) +(\d+) ", said, re.MULTILINE)
    found = {rule: [COUNTS[int(count)] for count in counts] for rule, *counts in rows}
    (weight,) = re.findall(r"more than the better of gh and ghpp in (\d+) of 10", said)
    gh_counts, ghpp_counts = found["gh"], found["ghpp"]
    words = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "Of ten cases on MNIST" in words
    assert f"GH gained in {gh_counts[0]} and lost in {gh_counts[1]}," in words
    assert f"GH++ gained in {ghpp_counts[0]} and lost in {ghpp_counts[1]}," in words
    assert f"In {COUNTS[int(weight)]} the better of two larger loss weights" in words
    words = " ".join((DOCS / "benchmarks.md").read_text(encoding="utf-8").split())
    assert f"`gh` gains in {gh_counts[0]} and loses in {gh_counts[1]}" in words
    assert f"`ghpp` gains in {ghpp_counts[0]} of ten" in words
    assert f"gains more in {COUNTS[int(weight)]} of ten" in words


def test_what_the_main_job_says_of_longer_runs_is_on_the_page() -> None:
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert f"\n{elsewhere()}\n```" in page
