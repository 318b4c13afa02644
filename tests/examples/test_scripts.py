"""Every recipe runs as it stands, and leaves no file behind."""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

import examples

RECIPES = [module.name for module in iter_modules(examples.__path__)]
RECIPES.remove("problem")


# As in test_lightning.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.usefixtures("fresh_state", "dde")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_and_leaves_nothing_behind(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    import_module(f"examples.{name}").main()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out
