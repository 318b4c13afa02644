"""skorch: the recipe against a literal loop, and what sklearn does with a net."""

import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

from sklearn.base import clone
from skorch.callbacks import GradientNormClipping, LRScheduler
from torch.optim.lr_scheduler import ExponentialLR
from torch.testing import assert_close

from examples.problem import TwoHeads, make_data
from examples.skorch_net import HarmonizedNet, make_net
from ghopt import HarmonizedOptimizer
from tests.examples import oracle
from tests.examples.oracle import steps_of, weights, wide


def make(**options: Any) -> HarmonizedNet:
    """Give a silent net that starts from the weights of ``TwoHeads().double()``."""
    quiet: dict[str, Any] = {"verbose": 0, "train_split": None, "max_epochs": 3}
    return make_net(**(quiet | {"module": TwoHeads().double()} | options))


def test_conflicting_tasks_train_as_in_a_literal_loop() -> None:
    data = wide(make_data())
    net = make().fit(*data)
    expected = TwoHeads().double()
    assert oracle.train(expected, steps_of(data, 16, epochs=3)) > 4
    assert_close(weights(net.module_), weights(expected), rtol=1e-12, atol=1e-12)


def test_clipping_meets_the_harmonized_gradient() -> None:
    data = wide(make_data())
    net = make(callbacks=[GradientNormClipping(0.5)]).fit(*data)
    expected = TwoHeads().double()
    assert oracle.train(expected, steps_of(data, 16, epochs=3), clip=0.5) > 4
    assert_close(weights(net.module_), weights(expected), rtol=1e-12, atol=1e-12)


def test_tasks_that_agree_train_as_on_their_sum() -> None:
    data = wide(make_data(conflict=False))
    net = make().fit(*data)
    expected = TwoHeads().double()
    steps = steps_of(data, 16, epochs=3)
    assert oracle.train(expected, steps, harmonize=False) == 0
    assert_close(weights(net.module_), weights(expected), rtol=1e-12, atol=1e-12)


def test_a_scheduler_takes_the_wrapper() -> None:
    scheduler = LRScheduler(ExponentialLR, gamma=0.9, step_every="batch")
    data = wide(make_data())
    net = make(callbacks=[scheduler]).fit(*data)
    expected = TwoHeads().double()
    steps = steps_of(data, 16, epochs=3)
    assert oracle.train(expected, steps, make_scheduler=oracle.decay) > 4
    assert_close(weights(net.module_), weights(expected), rtol=1e-12, atol=1e-12)


def test_options_reach_the_optimizer_inside() -> None:
    net = make(optimizer__nesterov=True).initialize()
    assert isinstance(net.optimizer_, HarmonizedOptimizer)
    (group,) = net.optimizer_.param_groups
    assert group["nesterov"]
    assert group["momentum"] == 0.9
    net.set_params(lr=0.5)
    assert group["lr"] == 0.5


def test_saved_parameters_go_on_where_they_were_saved(tmp_path: Path) -> None:
    files = {
        "f_params": tmp_path / "model.pt",
        "f_optimizer": tmp_path / "optimizer.pt",
    }
    data = wide(make_data())
    net = make().fit(*data)
    net.save_params(**files)
    other = make(module=TwoHeads(seed=1).double()).initialize()
    other.load_params(**files)
    net.partial_fit(*data)
    other.partial_fit(*data)
    assert_close(weights(other.module_), weights(net.module_), rtol=0, atol=0)


def test_copies_of_a_fitted_net_go_on_as_it_does() -> None:
    data = wide(make_data())
    net = make().fit(*data)
    copies = [deepcopy(net), pickle.loads(pickle.dumps(net))]
    net.partial_fit(*data)
    for copy in copies:
        copy.partial_fit(*data)
        assert_close(weights(copy.module_), weights(net.module_), rtol=0, atol=0)


def test_a_clone_of_a_fitted_net_starts_afresh() -> None:
    data = wide(make_data())
    net = make(module=TwoHeads, module__seed=3)
    data = make_data()
    net.fit(*data)
    fresh = clone(net).fit(*data)
    assert_close(weights(fresh.module_), weights(net.module_), rtol=0, atol=0)


def test_the_net_validates_on_the_sum() -> None:
    data = make_data()
    net = make_net(verbose=0, max_epochs=2).fit(*data)
    assert len(net.history[:, "valid_loss"]) == 2
