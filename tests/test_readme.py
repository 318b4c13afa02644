"""The README: its code runs and prints what it shows, and it stays short.

It is also the page that a package index shows, where links to files lead nowhere.
"""

import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch

import ghopt
from ghopt import Recording
from tests.pages import ROOT, files_named, pictures_of, run_page

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        assert run_page(README, tmp_path) == 2
    recording = Recording.from_jsonl(tmp_path / "run.jsonl")
    assert recording.names == ("up", "down")
    assert recording.conflicts.any()


def test_the_readme_is_read_to_its_end() -> None:
    assert TEXT.count("\n") <= 160


def test_the_first_lines_say_what_the_package_is() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    (torch_bound,) = setup["options"]["install_requires"].split()
    line = (
        f"Version {ghopt.__version__} · Python {setup['options']['python_requires']} · "
        f"{torch_bound} · {setup['metadata']['license_expression']}\n"
    )
    assert line in TEXT.replace(">= ", ">=").replace("torch >=", "torch>=")


def test_every_file_names_the_same_version() -> None:
    version = re.escape(ghopt.__version__)
    for name, line in [
        ("CITATION.cff", rf"version: {version}"),
        ("CHANGELOG.md", rf"## {version} - \d{{4}}-\d\d-\d\d"),
    ]:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert re.search(rf"^{line}$", text, re.MULTILINE), name


def test_the_costs_are_those_of_the_table() -> None:
    table = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    row, _memory = re.findall(r"^\| \*\*`gh`\*\* \| (1\..*) \|$", table, re.MULTILINE)
    (plain,) = re.findall(r"^\| plain sum.*? \| (.*) \|$", table, re.MULTILINE)
    pairs = zip(row.split(" | "), plain.split(" | "), strict=True)
    ratios = [f"{float(ours) / float(theirs):.1f}" for ours, theirs in pairs]
    resnet, transformer, mlp128, mlp32, tiny, pde = ratios
    assert resnet == transformer == pde
    assert mlp128 == mlp32
    words = " ".join(TEXT.split())
    assert f"{resnet} times the plain step on ResNet-18, a transformer and" in words
    assert f"{mlp32} times on MLPs, {tiny} times on 50 thousand" in words
    # And those are on the page of the benchmark.
    page = (ROOT / "benchmarks" / "speed" / "README.md").read_text(encoding="utf-8")
    (short,) = re.findall(r"^## In short$(.*?)^## ", page, re.DOTALL | re.MULTILINE)
    for figure in row.split(" | "):
        assert figure in short


def test_links_work_wherever_the_readme_is_shown() -> None:
    # But for pictures, which a package index leaves out: their words say what they show.
    links = re.findall(r"(?<!!)\[[^]]*\]\(([^)]*)\)", TEXT)
    assert links
    for link in links:
        assert link.startswith("https://"), link


def test_what_the_readme_names_is_there() -> None:
    named = files_named(README)
    assert len(named) > 25
    pictures = pictures_of(README)
    assert len(pictures) == 4
    assert all(len(words) > 60 for words in pictures.values())
    for place in {*named, *pictures}:
        assert (ROOT / place).exists(), place


def test_every_recipe_is_in_the_readme() -> None:
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    for script in scripts - {"__init__.py", "problem.py"}:
        assert f"`{script}`" in TEXT
