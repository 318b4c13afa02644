"""Every recipe runs as it stands, and leaves no file behind."""

import warnings
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

import examples

RECIPES = [module.name for module in iter_modules(examples.__path__)]
RECIPES.remove("problem")
# These want the CUDA build of torch, or an older pandas: run by hand, and here where they
# are found.
NEEDED = {
    "forecasting_tft": "pytorch_forecasting",
    "torchvision_detection": "torchvision",
    "ultralytics_yolo": "ultralytics",
}


# As in test_lightning, and in test_peft_lora.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
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
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
        warnings.simplefilter("ignore")  # of versions that nobody has looked at
    monkeypatch.chdir(tmp_path)
    import_module(f"examples.{name}").main()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out
