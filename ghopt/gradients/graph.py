"""What the graph of some losses shows before a pass runs: its nodes, and who listens.

Hooks are not to be seen on every node. Those of tensors between the leaves lie in C++, and
torch shows them only while someone holds the tensor. But each hook takes a number from
one counter of the process, and each node has a number of its own: where none was given
away since before a node was made, nobody has hooked it. (Hooks on a module that were
registered before count, too: only the next pass then takes no notice of what is clean.)
``retain_grad`` takes no number.

Much of this torch shows under names that it does not promise. What :mod:`deferred` and
:mod:`together` go by, too, is looked for in :func:`is_supported`, once: where a name is
missing, each task gets a pass of its own.
"""

import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

Edges: TypeAlias = Mapping[Node, Sequence[tuple[int, Node, int]]]
"""The edges of each node: at which place, where to, and to which output there."""

PLAIN = (Tensor, torch.nn.Parameter)
LEAF = "torch::autograd::AccumulateGrad"
BUILT_IN: Mapping[str, type] = {
    name: kind
    for name, kind in vars(getattr(torch._C, "_functions", object)).items()
    if isinstance(kind, type)
}
"""The kinds of nodes of torch itself, by name."""

_MOST_LEAVES = 1000


@cache
def is_supported() -> bool:
    """Say whether this torch shows all that there is to see in a graph.

    torch 2.8 does not show who unpacks what a node saved, and an activation may be
    computed anew at each look (checkpoints).
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros((1, 1), device="cpu", requires_grad=True)
        node: Any = leaf.mm(leaf.t()).grad_fn
    needed = {
        "_saved_self _saved_mat2 _raw_saved_self _sequence_nr": node,
        "unpack_hook": getattr(node, "_raw_saved_self", None),
        "_version _backward_hooks _post_accumulate_grad_hooks": leaf,
        "_forward_cls": getattr(torch.autograd.Function, "_backward_cls", None),
        "next_id": RemovableHandle,
        "_get_sequence_nr": torch._C._autograd,
        "_is_checkpoint_valid": torch.autograd,
    }
    return {"AccumulateGrad", type(node).__name__} <= BUILT_IN.keys() and all(
        hasattr(owner, name)
        for names, owner in needed.items()
        for name in names.split()
    )


def is_special(losses: Iterable[Tensor]) -> bool:
    """Say whether the passes are not all that happens, or not as they were recorded."""
    # What has not been imported cannot have been switched on.
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    return (
        (dist.is_available() and dist.is_initialized())
        or (
            compiled is not None
            and getattr(compiled, "compiled_autograd_enabled", True)
        )
        # There autograd computes in lower precision, and not with every operation.
        or torch.is_autocast_enabled("cpu")
        or any(type(loss) not in PLAIN for loss in losses)
    )


def edges_of(losses: Iterable[Tensor]) -> Edges:
    """List the nodes that some losses reach, with their edges."""
    stack = [get_gradient_edge(loss).node for loss in losses]
    edges: dict[Node, list[tuple[int, Node, int]]] = {}
    while stack:
        node = stack.pop()
        if node in edges:
            continue
        edges[node] = [
            (place, child, output)
            for place, (child, output) in enumerate(node.next_functions)
            if child is not None
        ]
        stack += [child for _, child, _ in edges[node]]
    return edges


def hides(node: Any) -> bool:
    """Say whether a node keeps tensors in another place, or makes them anew.

    Or one whose gradient its owner has asked to see.

    Raises:
        RuntimeError: as a pass would: if the graph was freed, or a tensor changed.
    """
    kind: Any = type(node)
    for name in _saved_by(kind):
        raw = getattr(node, f"_raw_saved_{name}")
        if any(one.unpack_hook is not None for one in _listed(raw)):
            return True
        # Now to ask for it computes nothing.
        saved = _listed(getattr(node, f"_saved_{name}"))
        if any(tensor is not None and tensor.retains_grad for tensor in saved):
            return True
    return False


def _listed(saved: Any) -> tuple[Any, ...]:
    """List what a node saved under one name, one tensor or several."""
    return saved if isinstance(saved, tuple) else (saved,)


@cache
def _saved_by(kind: Any) -> list[str]:
    """List the names of the tensors that a kind of node saves."""
    start = "_raw_saved_"
    return [n.removeprefix(start) for n in dir(kind) if n.startswith(start)]


def is_hooked(node: Any) -> bool:
    """Say whether someone has hooked a node itself."""
    handles = [
        register(ignore) for register in (node.register_hook, node.register_prehook)
    ]
    # The hooks of a node are in one dictionary of each kind, to which ours were added.
    found = any(len(handle.hooks_dict_ref()) > 1 for handle in handles)
    for handle in handles:
        handle.remove()
    HOOKS.ours(len(handles))
    return found


def ignore(*_: object) -> None:
    """Leave the gradients as they are."""


class Hooks(threading.local):
    """What is known of the hooks of this process, in one thread, which numbers its nodes.

    The first ``count`` of them were registered before any node from number ``since`` on
    was made.
    """

    def __init__(self) -> None:
        self._count, self._since = -1, 0
        # Numbers of leaves that nobody listened to, after so many hooks. A tensor that
        # takes the place of one is newer than all hooks; a weak reference to a parameter
        # would forbid torch to swap it.
        self._clean: set[int] = set()
        self.note()

    def note(self) -> None:
        """Note that all hooks up to now are older than all nodes from now on."""
        if not is_supported():
            return
        # Where no hook is new, the older note says more.
        if self._count != RemovableHandle.next_id:
            self._count = RemovableHandle.next_id
            self._since = torch._C._autograd._get_sequence_nr()
            self._clean.clear()

    def ours(self, number: int) -> None:
        """Do not count that so many hooks were registered, and removed again."""
        if self._count == RemovableHandle.next_id - number:
            self._count += number

    @property
    def are_known(self) -> bool:
        """Say whether no hook was registered since the last note."""
        return self._count == RemovableHandle.next_id

    def may_be_on(self, node: Any) -> bool:
        """Say whether a node that is no leaf, or its output, may have a hook."""
        return not self.are_known or bool(node._sequence_nr() < self._since)

    def are_on_leaf(self, leaf: Any) -> bool:
        """Say whether someone listens to a leaf."""
        variable: Tensor = leaf.variable
        if variable._backward_hooks or variable._post_accumulate_grad_hooks:
            return True
        # A leaf has one node at a time: it was looked at, and no hook is newer.
        if self.are_known and id(variable) in self._clean:
            return False
        if is_hooked(leaf):
            return True
        if len(self._clean) >= _MOST_LEAVES:  # inputs, that die after each step
            self._clean.clear()
        self._clean.add(id(variable))
        return False


HOOKS = Hooks()
"""Of this process."""
