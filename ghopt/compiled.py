"""Compiled models: their backward passes must leave what later passes need.

``torch.compile`` lets a backward pass write into buffers that the forward pass saved: it
*donates* them. A second pass through that graph would read what the first one left there.
Where the first pass through a new graph retains it, torch donates nothing; else it refuses
the second pass: where a single pass came first, or where its cache on the disk holds the
graph of a training with single passes. And in two ways the second pass is wrong in
silence: the cache of inductor does not tell the backward graphs with and without donation
apart, and with ``donated_buffer = False`` torch runs older graphs that donate unchecked.

So :func:`keep_buffers` turns donation off when ghopt is imported, for the whole process,
since torch has no such option for one model, and has the cache tell the graphs apart.
:func:`refuse_donated` finds graphs that are older than that. All of this goes by names that
torch does not promise: a torch that lacks them is taken to donate nothing.
"""

import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any

import torch.compiler.config
from torch import Tensor
from torch.autograd.graph import Node


class _Tag(str):
    """A tag of torch's caches that tells, besides, which buffers a graph donates.

    The cache makes the key of a graph by pickling all that the graph depends on.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        # What inductor itself asks; no graph is compiled by it where it is not imported.
        inductor: Any = sys.modules.get("torch._inductor.utils")
        donated = inductor.get_donated_idxs() if inductor else None
        return str, (f"{self} donated: {donated or []}",)


def keep_buffers() -> None:
    """Have torch compile backward passes that donate no buffer, from now on.

    In all threads, but not where ``torch._functorch.config.donated_buffer`` is set later;
    then a graph may be refused, but is not wrong. A tag of your own for torch's caches
    (``cache_key_tag`` of ``torch.compiler.config``) is kept if it is set before.
    """
    tag = _Tag(torch.compiler.config.cache_key_tag)
    with suppress(ImportError):
        _set(import_module("torch._functorch.config"), "donated_buffer", False)
    _set(torch.compiler.config, "cache_key_tag", tag)


def _set(config: ModuleType, name: str, value: object) -> None:
    """Set an option as its environment variable would; leave out what is not there."""
    options: dict[str, Any] = getattr(config, "_config", {})
    if name in options:
        # To set the attribute alone, since torch 2.12, serves this thread alone.
        options[name].env_value_default = value
    if getattr(config, name, value) is not value:
        setattr(config, name, value)


def refuse_donated(losses: Iterable[Tensor]) -> None:
    """Refuse losses whose graph serves a single backward pass, before any runs.

    Raises:
        RuntimeError: if the backward pass of a compiled part donates buffers.
    """
    # torch imports this to compile the first backward pass of a process.
    if "torch._functorch.aot_autograd" not in sys.modules:
        return
    stack = [loss.grad_fn for loss in losses]
    seen = {None, *stack}
    while stack:
        node = stack.pop()
        if _donates(node):
            raise RuntimeError(
                "losses come from a compiled model whose backward pass gives buffers away "
                "that the passes of later tasks need: it was compiled before ghopt was "
                "imported, or with torch._functorch.config.donated_buffer = True. Call "
                "torch.compiler.reset(), to have it compiled anew, and compute the losses "
                "again"
            )
        children = {child for child, _ in node.next_functions} - seen if node else set()
        seen |= children
        stack += children


def _donates(node: Node | None) -> bool:
    """Say whether a node is a backward pass, compiled already, that donates buffers."""
    function = getattr(node, "_forward_cls", None)
    # What is still to be compiled will donate none: its first pass retains the graph.
    is_compiled = getattr(function, "compiled_bw", None) is not None
    metadata = getattr(function, "metadata", None)
    return is_compiled and bool(getattr(metadata, "bw_donated_idxs", None))
