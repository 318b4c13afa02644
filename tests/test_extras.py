"""Each optional package is in the extra that an error names, before any work."""

import ast
import sys
from collections.abc import Callable, Iterator, Sequence
from configparser import ConfigParser
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path
from re import findall, match

import pytest
import torch

import examples
import ghopt
from benchmarks.mtl.problems import PROBLEMS
from benchmarks.speed.methods import METHODS
from benchmarks.uda.data import PACKAGES
from ghopt import Recorder
from ghopt.extras import from_extra
from ghopt.measuring import Harmonization
from tests.examples.test_scripts import NEEDED

HERE = Path(__file__).parents[1]

BY_PACKAGE = packages_distributions()

# Where the import stands alone, since another one before it says what to install.
ALONE = {
    "ghopt/gradients/kernels.py": "triton",  # imported where triton is found
    "ghopt/integrations/deepxde.py": "deepxde",  # a step of a model that is checked
    "ghopt/report.py": "plot",  # after new_figure
}


def name_of(distribution: str) -> str:
    found = match(r"[\w.-]+", distribution)
    assert found
    return found[0].lower().replace("_", "-")


def extras() -> dict[str, set[str]]:
    """Give the packages of each extra, as setup.cfg has them."""
    config = ConfigParser()
    config.read(HERE / "setup.cfg", encoding="utf-8")
    return {
        extra: {name_of(line) for line in lines.split("\n") if line}
        for extra, lines in config.items("options.extras_require")
    }


EXTRAS = extras()


def imports(node: ast.AST, extra: str = "") -> Iterator[tuple[str, str]]:
    """Yield the packages that run-time code imports, and the extra of their block."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.If(test=ast.Name("TYPE_CHECKING")):
                continue
            case ast.Import(names):
                yield from ((one.name.partition(".")[0], extra) for one in names)
            case ast.ImportFrom(module=str(module)):
                yield module.partition(".")[0], extra
            case ast.With(
                items=[
                    ast.withitem(
                        ast.Call(ast.Name("from_extra"), [ast.Constant(str(own))])
                    )
                ]
            ):
                yield from imports(child, own)
            case _:
                yield from imports(child, extra)


def foreign(path: Path) -> set[tuple[str, str]]:
    """Give the optional packages that a file imports, each with its extra."""
    ours = {*sys.stdlib_module_names, "torch", "ghopt", "benchmarks", "examples"}
    module = ast.parse(path.read_text(encoding="utf-8"))
    return {(name, extra) for name, extra in imports(module) if name not in ours}


def distributions(package: str) -> set[str]:
    return {name_of(one) for one in BY_PACKAGE.get(package, [])}


@pytest.mark.parametrize("room", ["ghopt", "benchmarks"])
def test_each_optional_import_names_an_extra_that_has_it(room: str) -> None:
    seen = 0
    for path in HERE.glob(f"{room}/**/*.py"):
        place = path.relative_to(HERE).as_posix()
        for package, extra in foreign(path):
            seen += 1
            assert extra or place in ALONE, f"{place} imports {package} by itself"
            wanted = EXTRAS[extra or ALONE[place]]
            assert distributions(package) & wanted, f"{place}: {package} is not in it"
    assert seen > 4


def test_what_a_benchmark_says_it_needs_is_in_its_extra() -> None:
    """Others than quadprog, which comes with an extra of TorchJD's."""
    needs = [("mtl", one) for problem in PROBLEMS.values() for one in problem.needs]
    needs += [("peers", one) for method in METHODS for one in method.needs]
    needs += [("bench", one) for one in PACKAGES]
    assert {extra for extra, _ in needs} == {"mtl", "peers", "bench"}
    for extra, package in needs:
        if package != "quadprog":
            assert distributions(package) & EXTRAS[extra], (
                f"{package} is not in {extra}"
            )


def test_the_examples_have_an_extra() -> None:
    paths = [path for path in HERE.glob("examples/*.py") if path.stem not in NEEDED]
    packages = {package for path in paths for package, _ in foreign(path)}
    lacking = {one for one in packages if not distributions(one) & EXTRAS["examples"]}
    assert len(packages) > 8
    assert not lacking
    # And what they call of ghopt.
    used = {"deepxde", "lightning", "transformers"}
    assert set.union(*(EXTRAS[one] for one in used)) <= EXTRAS["examples"]
    assert Path(examples.__file__).parent == HERE / "examples"


def test_the_tests_have_all_that_anything_needs() -> None:
    tools = {"check", "docs"}
    for extra, packages in EXTRAS.items():
        assert extra in tools or packages <= EXTRAS["test"]


def hide(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a package be missing, with all in it that was imported already."""
    for name in [*sys.modules]:
        if name.startswith(f"{package}."):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)


PHOTOGRAPHS = "--data . --dataset office-31 --source amazon --target webcam"


@pytest.mark.parametrize(
    ("command", "arguments", "extra", "packages"),
    [
        ("ghopt.report", "run.jsonl", "plot", ["matplotlib"]),
        (
            "benchmarks.uda.__main__",
            "",
            "bench",
            ["matplotlib", "tqdm", "mlxtend", "sklearn"],
        ),
        (
            "benchmarks.uda.figures",
            "",
            "bench",
            ["matplotlib", "sklearn", "tqdm", "mlxtend"],
        ),
        (
            "benchmarks.uda.table3",
            "--quick",
            "bench",
            ["tqdm", "mlxtend", "scipy", "sklearn"],
        ),
        ("benchmarks.uda.timing", "", "bench", ["mlxtend", "sklearn"]),
        ("benchmarks.uda.plots", ".", "bench", ["matplotlib"]),
        ("benchmarks.uda.verdict", "--draw pictures", "bench", ["matplotlib"]),
        ("benchmarks.uda.geometry", "pictures", "bench", ["matplotlib"]),
        ("benchmarks.uda.adapt", PHOTOGRAPHS, "images", ["PIL", "tqdm"]),
        ("benchmarks.uda.adapt", PHOTOGRAPHS, "images", ["transformers"]),
        ("benchmarks.mtl.__main__", "", "mtl", ["mlxtend", "sklearn", "torchjd"]),
        (
            "benchmarks.speed.__main__",
            "",
            "peers",
            ["conflictfree", "pytorch_optimizer", "quadprog", "torchjd"],
        ),
    ],
)
def test_a_command_says_at_once_which_extra_it_lacks(
    command: str,
    arguments: str,
    extra: str,
    packages: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    recorder = Recorder()
    recorder.record(Harmonization(("a", "b"), torch.eye(2), torch.ones(2)))
    recorder.flush().to_jsonl("run.jsonl")
    main: Callable[[list[str]], object] = import_module(command).main
    for package in packages:
        with monkeypatch.context() as here:
            hide(package, here)
            with pytest.raises(SystemExit, match="2"):
                main(arguments.split())
        said = capsys.readouterr()
        # Nothing before it: no table, no bar, no seed.
        assert not said.out
        assert said.err.startswith(
            f"usage: python -m {command.removesuffix('.__main__')}"
        )
        *_, error = said.err.splitlines()
        wanted = rf'.*: error: {package}.* is missing; install it with: pip install "ghopt\[{extra}\]"'
        assert match(wanted, error), error
        assert [*tmp_path.iterdir()] == [tmp_path / "run.jsonl"]


def test_what_the_pages_say_to_run_runs() -> None:
    """A module without its last two lines does nothing, and says nothing."""
    pages = [HERE / "README.md", *HERE.glob("benchmarks/*/README.md")]
    pages += [*HERE.glob("docs/**/*.rst"), *HERE.glob("docs/**/*.md")]
    pages += [*HERE.glob("benchmarks/**/*.py"), *HERE.glob("examples/*.py")]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    commands = {
        name
        for text in texts
        for name in findall(r"-m ((?:benchmarks|examples|ghopt)\.[a-z0-9_.]*\w)", text)
    }
    assert len(commands) > 20
    for command in commands:
        place = HERE / command.replace(".", "/")
        path = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
        guard = 'if __name__ == "__main__":\n    '
        assert guard in path.read_text(encoding="utf-8"), command


def test_peers_that_are_not_asked_for_need_not_be_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("conflictfree", "pytorch_optimizer", "quadprog", "torchjd"):
        hide(package, monkeypatch)
    main = import_module("benchmarks.speed.__main__").main
    main(
        [
            "--networks",
            "tiny",
            "--tasks",
            "2",
            "--tables",
            "memory",
            "--methods",
            "plain",
        ]
    )
    assert "memory, K = 2" in capsys.readouterr().out


def test_what_an_imported_package_lacks_is_named_too() -> None:
    message = 'a package that this needs is missing; install it with: pip install "gh'
    with pytest.raises(ImportError, match=message), from_extra("plot"):
        raise ImportError("no such thing in it")


def test_the_version_is_the_one_that_is_installed() -> None:
    config = ConfigParser()
    config.read(HERE / "setup.cfg", encoding="utf-8")
    assert config.get("metadata", "version") == "attr: ghopt.__version__"
    assert match(r"\d+\.\d+\.\d+", ghopt.__version__)
