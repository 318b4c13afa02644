"""Weight gradients of linear layers made once for all tasks, not once for each.

For a product ``Y = X W^T`` of M rows, task k contributes an output gradient ``D_k``,
``[M, q]``. The inner products of the weight gradients ``D_k^T X`` are those of the rows,
``<D_i, (X X^T) D_j>``, and their weighted sum is one product, ``(sum_k tau_k D_k)^T X``.
With few rows this is less work than K products, and less memory: no task's gradient of
the weight is ever made. On the CPU: how it compares on a GPU was not measured, and the
streams of the passes would have to be waited for.

Nothing is done to the model or its forward pass. Before the passes the products are
found in the graph of the losses: a weight is deferred only if all edges that lead to it
there come from such products, and nobody listens to them. Then the passes run with all
else as their ``inputs``, so autograd leaves the gradients of these weights out. Whatever
else a weight serves for shows as an edge of another kind, and it goes the ordinary way.

What does not show is ``retain_grad()`` of a transposed weight that a caller made by hand,
for a product whose input requires no grad: it stays without ``.grad``. (A hook there
takes a number, see :mod:`ghopt.gradients.graph`: where one may be, such a weight goes the
ordinary way.)
"""

import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ghopt.gradients.graph import HOOKS, LEAF, PLAIN, Edges, is_hooked
from ghopt.gradients.tasks import JoinedGradients, StoredGradients, TaskGradients

# Nodes of products: which of their edges leads to the right factor, and the name under
# which they save the left one.
_PRODUCTS = {"AddmmBackward0": (2, "mat1"), "MmBackward0": (1, "self")}

# Below so many elements that need not be made, the calls of torch cost more. Measured on
# the CPU, with layers of 128 and 256 units.
_LEAST = 2**16

_Parents: TypeAlias = Mapping[Node, Sequence[tuple[Node, int]]]
"""The edges to each node: where from, and at which place."""


class _Product(NamedTuple):
    """One product with a weight in the graph: its node, and its input, ``[M, p]``."""

    node: Any  # torch.autograd.graph.Node says nothing of what its kinds save
    rows: Tensor


class _Layer(NamedTuple):
    """A weight after the passes.

    Attributes:
        weight: shape ``[q, p]``.
        rows: the inputs of all its products, X, shape ``[M, p]``.
        tasks: those that reach it, k of them.
        outputs: their output gradients, D, shape ``[k, M, q]``, float64.
    """

    weight: Tensor
    rows: Tensor
    tasks: list[int]
    outputs: Tensor


class Deferral:
    """The passes of one step, and what they leave of the weights that are deferred.

    Args:
        names: of the tasks, K of them.
        products: those of each weight.
        leaves: nodes that the passes are to reach beside these products.
    """

    def __init__(
        self,
        names: Iterable[str],
        products: dict[Tensor, list[_Product]],
        leaves: Iterable[Node],
    ) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}
        self._products = products
        # By weight, task and product.
        self._outputs: dict[Tensor, dict[int, dict[int, Tensor]]] = {}
        nodes = [product.node for group in products.values() for product in group]
        # A product that leads to nothing else would not run without an edge of its own.
        self._edges = tuple(GradientEdge(node, 0) for node in [*leaves, *nodes])
        self._kept: list[tuple[Tensor, int]] = []
        for group in products.values():
            for product in group:
                self._keep(product.rows)

    def run(self, name: str, loss: Tensor, retain_graph: bool) -> None:
        """Run the pass of a task."""
        handles = [
            product.node.register_prehook(
                partial(self._note, weight, self._numbers[name], index)
            )
            for weight, group in self._products.items()
            for index, product in enumerate(group)
        ]
        try:
            torch.autograd.backward(loss, retain_graph=retain_graph, inputs=self._edges)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def join(self, stored: StoredGradients) -> TaskGradients:
        """End the passes, and give what they leave together with what they stored.

        A weight may have a gradient nevertheless, of earlier micro-batches, or from a
        node that ran a backward pass of its own. Inner products with it are unknown, so
        the gradients of this weight are made, task by task, and it counts as not
        deferred.

        Args:
            stored: gradients of all other parameters; added to.

        Raises:
            RuntimeError: if a tensor that is still needed was modified in place.
        """
        for tensor, version in self._kept:
            if tensor._version != version:
                raise RuntimeError(
                    "inputs and output gradients of deferred linear layers must stay as "
                    f"they are until the last pass, but one of shape {list(tensor.shape)} "
                    'was modified in place: use passes="separate"'
                )
        names = [*self._numbers]
        elsewhere = {weight for name in names for weight in stored[name]}
        layers = []
        for weight, outputs in self._outputs.items():
            layer = _join(weight, self._products[weight], outputs)
            if weight not in elsewhere:
                layers.append(layer)
                continue
            for task, output in zip(layer.tasks, layer.outputs, strict=True):
                made = _multiply(output, layer.rows)
                other = stored[names[task]].get(weight)
                stored[names[task]][weight] = (
                    made if other is None else made.add_(other)
                )
        self._outputs.clear()
        self._kept.clear()
        if not layers:
            return stored
        return JoinedGradients([DeferredGradients(layers, len(names)), stored])

    def _note(
        self, weight: Tensor, task: int, index: int, grads: Sequence[Tensor | None]
    ) -> None:
        """Keep an output gradient: autograd calls this."""
        (output,) = grads
        if output is not None:
            tasks = self._outputs.setdefault(weight, {})
            tasks.setdefault(task, {})[index] = output
            self._keep(output)

    def _keep(self, tensor: Tensor) -> None:
        """Note that a tensor must not change until the end."""
        self._kept.append((tensor, tensor._version))


class DeferredGradients:
    """Weight gradients of linear layers, of which only the factors were made.

    Args:
        layers: at least one.
        tasks: number of tasks, K.
    """

    def __init__(self, layers: Sequence[_Layer], tasks: int) -> None:
        self._layers = layers
        self._tasks = tasks

    def __bool__(self) -> bool:
        """Say whether a task reaches a parameter: there is none without a layer."""
        return bool(self._layers)

    @torch.no_grad()
    def gramian(self, over: Iterable[Tensor] | None = None) -> Tensor:
        """See :meth:`ghopt.gradients.TaskGradients.gramian`."""
        wanted = None if over is None else set(over)
        parts = [
            _inner_products(layer, self._tasks)
            for layer in self._layers
            if wanted is None or layer.weight in wanted
        ]
        none = self._layers[0].rows.new_zeros(
            self._tasks, self._tasks, dtype=torch.float64
        )
        return reduce(torch.add, parts, none)

    @torch.no_grad()
    def combine(
        self,
        weights: Tensor,
        gramian: Tensor | None = None,  # noqa: ARG002  # float64 cancels well enough
        *,
        keep: bool = False,  # noqa: ARG002  # nothing here is spoilt
    ) -> dict[Tensor, Tensor]:
        """See :meth:`ghopt.gradients.TaskGradients.combine`."""
        return {
            layer.weight: _multiply(_weighted(layer, weights), layer.rows)
            for layer in self._layers
        }


def may_pay(parameters: Iterable[Tensor], tasks: int) -> bool:
    """Say whether a weight is large enough that deferring it may save anything.

    With one row. It spares those that cannot gain the walk through their graph.

    Args:
        parameters: that are to be harmonized.
        tasks: number of losses that require grad.
    """
    return any(p.dim() == 2 and _pays(1, p, tasks) for p in parameters)


def defer(
    losses: Mapping[str, Tensor], parameters: Iterable[Tensor], edges: Edges
) -> Deferral | None:
    """Find the weights whose gradients are cheaper deferred, and may be.

    Args:
        losses: K scalars by name, before their first pass; none that is special, see
            :func:`ghopt.gradients.graph.is_special`.
        parameters: those that are to be harmonized.
        edges: of all that the losses reach.

    Returns:
        What runs the passes in place of ``loss.backward``; None if there is nothing to
        gain.

    Raises:
        RuntimeError: as the passes would: if the graph was freed, or the input of a
            layer modified in place.
    """
    wanted = {parameter for parameter in parameters if _is_plain(parameter)}
    if not wanted or any(map(_runs_backward, edges)):
        return None
    live = (loss for loss in losses.values() if loss.requires_grad)
    reached = [_reach(loss, edges) for loss in live]
    parents = defaultdict(list)
    for node, children in edges.items():
        for place, child, _ in children:
            parents[child].append((node, place))
    leaves: list[Any] = [node for node in edges if node.name() == LEAF]
    products: dict[Tensor, list[_Product]] = {}
    for leaf in leaves:
        found = _products(leaf, parents) if leaf.variable in wanted else []
        nodes = [product.node for product in found]
        tasks = sum(not nodes_of_task.isdisjoint(nodes) for nodes_of_task in reached)
        rows = sum(len(product.rows) for product in found)
        if _pays(rows, leaf.variable, tasks) and not any(
            map(is_hooked, _chain(leaf, parents))
        ):
            products[leaf.variable] = found
    if not products:
        return None
    others = [leaf for leaf in leaves if leaf.variable not in products]
    return Deferral(losses, products, others)


def _is_plain(parameter: Tensor) -> bool:
    """Say whether a parameter has the form of a weight, and nobody listens to it."""
    return (
        parameter.dim() == 2
        and type(parameter) in PLAIN
        and parameter.dtype in (torch.float32, torch.float64)
        and parameter.device.type in ("cpu", "meta")
        and parameter.is_contiguous()
        and not parameter._backward_hooks
        and not parameter._post_accumulate_grad_hooks
    )


def _reach(loss: Tensor, edges: Edges) -> set[Node]:
    """List the nodes that a loss reaches."""
    stack: list[Node] = [get_gradient_edge(loss).node]
    reached = set(stack)
    while stack:
        for _, child, _ in edges[stack.pop()]:
            if child not in reached:
                reached.add(child)
                stack.append(child)
    return reached


def _runs_backward(node: Node) -> bool:
    """Say whether a node, as one of a reentrant checkpoint, forbids ``inputs=``."""
    if not isinstance(node, BackwardCFunction):
        return False
    function = inspect.unwrap(type(node)._forward_cls.backward)
    # All that forbid it ask torch the same question.
    code = getattr(function, "__code__", None)
    return code is not None and "_is_checkpoint_valid" in code.co_names


def _products(leaf: Node, parents: _Parents) -> list[_Product]:
    """List the products of a weight; none if it serves for anything else."""
    products = []
    for transposed, _ in parents[leaf]:
        if transposed.name() != "TBackward0":
            return []
        for node, place in parents[transposed]:
            rows = _input(node, place, transposed)
            if rows is None:
                return []
            products.append(_Product(node, rows))
    return products


def _chain(leaf: Node, parents: _Parents) -> Iterator[Node]:
    """List the nodes from those of the products to that of the weight."""
    yield leaf
    for transposed, _ in parents[leaf]:
        yield transposed
        yield from (node for node, _ in parents[transposed])


def _input(node: Any, edge: int, transposed: Node) -> Tensor | None:
    """Take X of a product if this is its edge to a weight, and it hides nothing."""
    if node.name() not in _PRODUCTS:
        return None
    place, name = _PRODUCTS[node.name()]
    if place != edge or getattr(node, "_saved_alpha", 1) != 1:
        return None
    for saved in (name, "mat2"):
        # Saved elsewhere, or to be computed anew: a checkpoint that is not reentrant.
        raw = getattr(node, f"_raw_saved_{saved}")
        if raw.unpack_hook is not None:
            return None
    right = node._saved_mat2
    if right is None and HOOKS.may_be_on(transposed):
        # Saved only for the gradient of X: a hook on it does not show.
        return None
    if right is not None and (right._backward_hooks or right.retains_grad):
        return None
    rows: Tensor = getattr(node, f"_saved_{name}")
    return rows if type(rows) in PLAIN and rows.layout is torch.strided else None


def _pays(rows: int, weight: Tensor, tasks: int) -> bool:
    """Say whether it is less work to defer a weight than to make its K gradients."""
    if not rows:
        return False
    q, p = weight.shape
    saved = (tasks - 1) * p * q
    # Measured on the CPU: a float64 operation costs two float32 ones.
    return saved >= _LEAST and 2 * rows * (p + tasks * q) < saved


def _join(
    weight: Tensor, products: list[_Product], outputs: dict[int, dict[int, Tensor]]
) -> _Layer:
    """Join the rows of all products of a weight."""
    joined = [
        _cat(
            [
                # A task may reach some of the products only.
                given[i] if i in given else rows.new_zeros(len(rows), len(weight))
                for i, (_, rows) in enumerate(products)
            ]
        )
        for given in outputs.values()
    ]
    rows = _cat([rows for _, rows in products])
    return _Layer(weight, rows, list(outputs), torch.stack(joined).double())


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _inner_products(layer: _Layer, tasks: int) -> Tensor:
    """Inner products ``[K, K]`` of the weight gradients, in float64.

    In float32 they would lose as many digits as the rows cancel, squared.
    """
    rows, outputs = layer.rows.double(), layer.outputs
    images = (rows @ rows.T) @ outputs
    products = outputs.flatten(1) @ images.flatten(1).T
    if len(outputs) == tasks:
        return products.triu() + products.triu(1).T
    total = products.new_zeros(tasks, tasks)
    for task, row in zip(layer.tasks, products, strict=True):
        for other, product in zip(layer.tasks, row, strict=True):
            total[task, other] = product
    return total.triu() + total.triu(1).T


def _weighted(layer: _Layer, weights: Tensor) -> Tensor:
    """Sum output gradients with their weights: shape ``[M, q]``, float64."""
    factors = weights.to(layer.outputs.device)
    if len(layer.tasks) < len(factors):
        factors = torch.stack([factors[task] for task in layer.tasks])
    return (factors @ layer.outputs.flatten(1)).view(layer.outputs.shape[1:])


def _multiply(output: Tensor, rows: Tensor) -> Tensor:
    """Make a weight gradient, ``[q, p]``, as autograd does, of a rounded ``[M, q]``."""
    return output.to(rows.dtype).T @ rows
