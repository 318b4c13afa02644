"""Migration from TorchJD: both loops end at the same parameters."""

from examples.from_torchjd import train_after, train_before
from examples.problem import TwoHeads, difference, make_data
from tests.examples.oracle import wide


def test_a_user_of_torchjd_ends_at_the_parameters_of_before() -> None:
    data = wide(make_data())
    before, after = TwoHeads().double(), TwoHeads().double()
    train_before(before, *data, steps=40)
    assert train_after(after, *data, steps=40) > 4
    assert difference(before, after) < 1e-12
    assert difference(after, TwoHeads().double()) > 0.1


def test_in_single_precision_only_rounding_parts_them() -> None:
    before, after = TwoHeads(), TwoHeads()
    train_before(before, *make_data(), steps=40)
    train_after(after, *make_data(), steps=40)
    assert difference(before, after) < 1e-5
