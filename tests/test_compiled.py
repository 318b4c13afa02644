"""What ghopt sets in torch.compile; what that is for: ``contract/test_compile.py``."""

import sys
from collections.abc import Iterator
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch._functorch.config
import torch.compiler.config
from torch import nn
from torch._guards import TracingContext, tracing
from torch._inductor.codecache import compiled_fx_graph_hash
from torch.fx import symbolic_trace

from ghopt.compiled import keep_buffers

# The modules of options make their attributes as they are asked for.
autograd: Any = torch._functorch.config
compiler: Any = torch.compiler.config


def in_a_thread(config: ModuleType, name: str) -> Any:
    """Read an option of torch where nobody has set anything."""
    values: list[object] = []
    thread = Thread(target=lambda: values.append(getattr(config, name)))
    thread.start()
    thread.join()
    return values[0]


@pytest.fixture(autouse=True)
def _leave_options() -> Iterator[None]:
    """Put back, for all threads and for this one, what a test sets."""
    entries = [autograd._config["donated_buffer"], compiler._config["cache_key_tag"]]
    before = [entry.env_value_default for entry in entries]
    with (
        autograd.patch(donated_buffer=autograd.donated_buffer),
        compiler.patch(cache_key_tag=compiler.cache_key_tag),
    ):
        yield
    for entry, everywhere in zip(entries, before, strict=True):
        entry.env_value_default = everywhere


def test_no_thread_donates_buffers() -> None:
    assert autograd.donated_buffer is False
    assert in_a_thread(autograd, "donated_buffer") is False


def key_of(donated: list[int] | None) -> str:
    """Make inductor's key of a graph whose backward pass donates buffers."""
    context: Any = TracingContext(None)
    context.fw_metadata = SimpleNamespace(bw_donated_idxs=donated)
    graph = symbolic_trace(nn.Tanh())
    with tracing(context):
        return compiled_fx_graph_hash(graph, [], {}, [])[0]


def test_inductor_tells_graphs_that_donate_buffers_apart() -> None:
    assert key_of([0]) != key_of([])
    assert key_of([0]) != key_of([1])
    assert key_of([0]) == key_of([0])
    assert key_of(None) == key_of([])


@pytest.mark.parametrize("donated", [[0], []])
def test_the_keys_of_a_training_without_ghopt_are_others(donated: list[int]) -> None:
    ours = key_of(donated)
    with compiler.patch(cache_key_tag=""):
        assert key_of(donated) != ours


def test_all_threads_tell_them_apart() -> None:
    with compiler.patch(cache_key_tag=in_a_thread(compiler, "cache_key_tag")):
        assert key_of([0]) != key_of([])


def test_a_tag_that_the_user_had_set_is_kept() -> None:
    ours = key_of([0])
    compiler.cache_key_tag = "theirs"
    without = key_of([0])
    keep_buffers()
    assert compiler.cache_key_tag == "theirs"
    assert in_a_thread(compiler, "cache_key_tag") == "theirs"
    assert len({ours, without, key_of([0]), key_of([1])}) == 4


def test_an_option_that_was_set_before_is_turned_off() -> None:
    autograd.donated_buffer = True
    keep_buffers()
    assert autograd.donated_buffer is False


def test_a_torch_without_an_option_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(autograd._config, "donated_buffer")
    keep_buffers()
    assert "donated_buffer" not in autograd._config


def test_a_torch_without_such_options_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    autograd.donated_buffer = True
    monkeypatch.setitem(sys.modules, "torch._functorch.config", None)
    keep_buffers()
    assert autograd.donated_buffer is True
