"""All tasks in one vmapped backward pass, through what their graphs have in common.

In a small network a pass costs its calls, not its arithmetic, and K tasks make the same
ones. So each task runs a pass of its own through what it alone reaches, its loss or its
head, and from where they meet one pass takes the K gradients side by side, as a batch.

Only where that cannot be told from separate passes: what is common are nodes of kinds whose
batching rules were tried, and nobody listens. What does not show is ``retain_grad()`` of a
tensor that no node saved as its input, as the one between a linear layer and its ReLU: its
``.grad`` becomes a tensor of a batch that has ended. Nor do hooks show that C++ registers,
or those of a graph that another thread made.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ghopt.gradients.graph import BUILT_IN, HOOKS, PLAIN, Edges, hides
from ghopt.gradients.matrix import gramian_of, weighted_row
from ghopt.gradients.sums import accumulate, cancel
from ghopt.losses import check_range

# Measured on an EPYC against separate passes, with MLPs of 1 to 12 layers of 48 to 300
# units: four tasks gain nothing, and from 5e5 parameters on, or with batches of 256, more
# tasks gain nothing either. Larger graphs were not tried.
_FEWEST_TASKS = 5
_MOST_ELEMENTS = 2**17
_MOST_NODES = 256
_LEAST_GAIN = 45

_Edge: TypeAlias = tuple[Node, int]
"""An output of a node, whose gradient a pass brings there."""

_LEAF = BUILT_IN.get("AccumulateGrad")

# Of nodes that the tasks have in common. Each is tried in the tests: its rule exists, and
# gives what separate passes do.
KINDS = frozenset(
    f"{kind}Backward{number}"
    for kind, numbers in {
        "Abs": "0", "Add": "0", "Addmm": "0", "Bmm": "0", "Cat": "0", "Clamp": "1",
        "Clone": "0", "Cos": "0", "Div": "0", "Elu": "0", "Exp": "0", "Expand": "0",
        "Gelu": "0", "LeakyRelu": "0", "Log": "0", "LogSigmoid": "0", "LogSoftmax": "0",
        "Mean": "01", "Mm": "0", "MseLoss": "0", "Mul": "0", "Mv": "0",
        "NativeLayerNorm": "0", "Neg": "0", "Permute": "0", "Pow": "0", "Relu": "0",
        "Rsub": "1", "Select": "0", "Sigmoid": "0", "Silu": "0", "Sin": "0", "Slice": "0",
        "Softmax": "0", "Softplus": "0", "Split": "0", "Sqrt": "0", "Squeeze": "01",
        "Stack": "0", "Sub": "0", "Sum": "01", "T": "0", "Tanh": "0", "Transpose": "0",
        "Unbind": "0", "UnsafeView": "0", "Unsqueeze": "0", "View": "0",
    }.items()
    for number in numbers
)  # fmt: skip
# Those of torch itself, but for some that make sparse gradients.
_BUILT_IN = frozenset(
    kind
    for name, kind in BUILT_IN.items()
    if not any(part in name for part in ("Embedding", "Gather", "Nested", "Sparse"))
)
_COMMON = frozenset(kind for kind in _BUILT_IN if kind.__name__ in KINDS)
# Of graphs of gradients, as in a PDE's residual, which lose: their rules call more.
_NESTED = frozenset(kind for kind in _BUILT_IN if "BackwardBackward" in kind.__name__)


class _Plan(NamedTuple):
    """Which passes to run.

    Attributes:
        tops: of each task that has a loss, the edges at which its own nodes meet those
            in common.
        own: of each, the leaves that it alone reaches.
        leaves: those in common.
    """

    tops: list[list[_Edge]]
    own: list[list[Any]]
    leaves: list[Any]


class Together:
    """The passes of one step, of which all tasks share one."""

    def __init__(self, losses: Sequence[Tensor], plan: _Plan) -> None:
        self._losses = losses
        self._plan = plan

    @torch.no_grad()
    def run(
        self, parameters: Sequence[Tensor], *, retain_graph: bool
    ) -> "TogetherGradients":
        """Run them, and add the plain sums to ``.grad`` of all leaves but the parameters.

        Args:
            parameters: that are to be harmonized; their ``.grad`` is left alone.
            retain_graph: keep the graph.

        Raises:
            RuntimeError: as any pass would. Nothing is changed then.
        """
        live = [k for k, loss in enumerate(self._losses) if loss.requires_grad]
        found: dict[Tensor, tuple[int, Tensor]] = {}
        tops: dict[_Edge, dict[int, Tensor]] = {}
        for task, edges, leaves in zip(
            live, self._plan.tops, self._plan.own, strict=True
        ):
            loss = self._losses[task]
            start = get_gradient_edge(loss)
            if edges == [(start.node, start.output_nr)]:
                tops.setdefault(edges[0], {})[task] = torch.ones_like(loss)
                continue
            ends = [GradientEdge(*edge) for edge in edges]
            ends += [GradientEdge(leaf, 0) for leaf in leaves]
            grads = torch.autograd.grad(
                loss, ends, retain_graph=retain_graph, allow_unused=True
            )
            for edge, grad in zip(edges, grads, strict=False):
                if grad is not None:
                    tops.setdefault(edge, {})[task] = grad
            for leaf, grad in zip(leaves, grads[len(edges) :], strict=True):
                if grad is not None:
                    found[leaf.variable] = task, grad
        common = self._run_common(live, tops, retain_graph)
        return _gathered(parameters, live, len(self._losses), found, common)

    def _run_common(
        self,
        live: Sequence[int],
        tops: Mapping[_Edge, Mapping[int, Tensor]],
        retain_graph: bool,
    ) -> dict[Tensor, Tensor]:
        """Take the gradients of the leaves in common, each ``[k, *shape]``."""
        if not tops:  # each task has passed nothing back
            return {}
        batches = []
        for grads in tops.values():
            zero = torch.zeros_like(next(iter(grads.values())))
            batches.append(torch.stack([grads.get(task, zero) for task in live]))
        leaves = self._plan.leaves
        made = torch.autograd.grad(
            [GradientEdge(*edge) for edge in tops],
            [GradientEdge(leaf, 0) for leaf in leaves],
            batches,
            retain_graph=retain_graph,
            allow_unused=True,
            is_grads_batched=True,
        )
        pairs = zip(leaves, made, strict=True)
        return {leaf.variable: rows for leaf, rows in pairs if rows is not None}


class TogetherGradients:
    """Gradients as one matrix for each parameter, with a row for each task.

    Args:
        rows: by parameter, each ``[K, n]``.
        tasks: number of tasks, K.
    """

    def __init__(self, rows: Mapping[Tensor, Tensor], tasks: int) -> None:
        self._rows = rows
        self._tasks = tasks

    def __bool__(self) -> bool:
        """Say whether a task reaches a parameter."""
        return bool(self._rows)

    def gramian(self, over: Iterable[Tensor] | None = None) -> Tensor:
        """See :meth:`ghopt.gradients.TaskGradients.gramian`."""
        wanted = self._rows if over is None else set(over)
        parts = [rows for parameter, rows in self._rows.items() if parameter in wanted]
        return gramian_of(parts, self._tasks)

    def combine(
        self,
        weights: Tensor,
        gramian: Tensor | None = None,
        *,
        keep: bool = False,  # noqa: ARG002  # nothing here is spoilt
    ) -> dict[Tensor, Tensor]:
        """See :meth:`ghopt.gradients.TaskGradients.combine`."""
        check_range(weights, {rows.dtype for rows in self._rows.values()}, gramian)
        wide = gramian is None or cancel(gramian, weights)
        return {
            parameter: weighted_row(rows, weights, wide=wide).view_as(parameter)
            for parameter, rows in self._rows.items()
        }


def may_pay(parameters: Iterable[Tensor], tasks: int) -> bool:
    """Say whether a network may be so small, and its tasks so many, that this is faster.

    Args:
        parameters: of the optimizer.
        tasks: number of losses that require grad.
    """
    return tasks >= _FEWEST_TASKS and (
        sum(parameter.numel() for parameter in parameters) <= _MOST_ELEMENTS
    )


def put_together(
    losses: Mapping[str, Tensor], parameters: Sequence[Tensor], edges: Edges
) -> Together | None:
    """Plan one pass for all tasks, where that is faster and nothing tells it apart.

    Args:
        losses: K scalars by name, before their first pass; none that is special, see
            :func:`ghopt.gradients.graph.is_special`.
        parameters: those that are to be harmonized.
        edges: of all that the losses reach.

    Raises:
        RuntimeError: as the passes would: if the graph was freed, or a tensor in it
            modified in place.
    """
    if len(edges) > _MOST_NODES or not HOOKS.are_known or torch.is_anomaly_enabled():
        return None
    kinds = {*map(type, edges)}
    if not kinds <= _BUILT_IN or kinds & _NESTED:
        return None
    starts = [get_gradient_edge(loss) for loss in losses.values() if loss.requires_grad]
    owners = _owners([start.node for start in starts], edges)
    common = [node for node, owner in owners.items() if owner is None]
    if not _pays(len(starts), len(common)):
        return None
    inner: list[Any] = [node for node in common if type(node) is not _LEAF]
    if any(type(node) not in _COMMON for node in inner):
        return None
    plan = _plan(starts, owners, edges)
    leaves = [*plan.leaves, *(leaf for own in plan.own for leaf in own)]
    if not (_meet(plan) and _are_plain(leaves, parameters)):
        return None
    if any(map(HOOKS.may_be_on, inner)) or any(
        hides(node) for node in edges if type(node) is not _LEAF
    ):
        return None
    return Together([*losses.values()], plan)


def _owners(starts: Iterable[Node], edges: Edges) -> dict[Node, int | None]:
    """Tell of each node which task alone reaches it; None if several do."""
    owners: dict[Node, int | None] = {}
    for task, start in enumerate(starts):
        stack: list[tuple[Node, int | None]] = [(start, task)]
        while stack:
            node, owner = stack.pop()
            if node in owners:
                if owners[node] in (owner, None):
                    continue
                owner = None
            owners[node] = owner
            stack += [(child, owner) for _, child, _ in edges[node]]
    return owners


def _plan(
    starts: Iterable[GradientEdge], owners: Mapping[Node, int | None], edges: Edges
) -> _Plan:
    """List where the own nodes of each task end."""
    plan = _Plan([], [], [])
    for start in starts:
        tops: list[_Edge] = []
        own: list[Any] = []
        stack: list[_Edge] = [(start.node, start.output_nr)]
        seen = set(stack)
        while stack:
            node, output = stack.pop()
            if owners[node] is None:
                tops.append((node, output))
            elif type(node) is _LEAF:
                own.append(node)
            below = {(child, to) for _, child, to in edges[node]} - seen
            if owners[node] is not None:
                seen |= below
                stack += below
        plan.tops.append(tops)
        plan.own.append(_trained(own))
    in_common = [node for node, owner in owners.items() if owner is None]
    plan.leaves.extend(_trained(node for node in in_common if type(node) is _LEAF))
    return plan


def _trained(leaves: Iterable[Any]) -> list[Any]:
    """Leave out what was frozen after the forward pass, which receives nothing."""
    return [leaf for leaf in leaves if leaf.variable.requires_grad]


def _meet(plan: _Plan) -> bool:
    """Say whether each task meets the others at one node, and most at the same."""
    meetings = [{node for node, _ in edges} for edges in plan.tops]
    return (
        # The pass of a task would run through all that leads from one to another.
        all(len(nodes) == 1 for nodes in meetings)
        # Where a task does not come by, the pass carries zeros for it.
        and len(set().union(*meetings)) <= 2
    )


def _pays(tasks: int, common: int) -> bool:
    """Say whether one pass through so many nodes in common is less work than K.

    Of these MLPs one with three layers gains from eight tasks on, one with seven from six.
    A trunk of two layers under eight heads, ten nodes, loses a twentieth.
    """
    return common * (tasks - _FEWEST_TASKS + 1) > _LEAST_GAIN


def _are_plain(leaves: Iterable[Any], parameters: Iterable[Tensor]) -> bool:
    """Say whether the rows of a matrix hold what leaves receive, and nobody listens."""
    variables = [leaf.variable for leaf in leaves]
    own = set(parameters)
    dtypes = {variable.dtype for variable in variables if variable in own}
    return (
        dtypes in ({torch.float32}, {torch.float64})
        and all(
            type(variable) in PLAIN
            and variable.device.type == "cpu"
            and variable.is_floating_point()
            and variable.is_contiguous()
            for variable in variables
        )
        and not any(map(HOOKS.are_on_leaf, leaves))
    )


def _gathered(
    parameters: Sequence[Tensor],
    live: Sequence[int],
    tasks: int,
    own: dict[Tensor, tuple[int, Tensor]],
    common: dict[Tensor, Tensor],
) -> TogetherGradients:
    """Give a matrix for each of the parameters; add the sums of others to their ``.grad``.

    Takes the gradients of the parameters out, so that there is no second copy of all.
    """
    matrices: dict[Tensor, Tensor] = {}
    for parameter in parameters:
        if parameter in common:
            rows = common.pop(parameter).reshape(len(live), -1)
            if len(live) < tasks:
                rows = rows.new_zeros(tasks, rows.shape[1]).index_copy_(
                    0, torch.tensor(live, device=rows.device), rows
                )
            matrices[parameter] = rows
        elif parameter in own:
            task, grad = own.pop(parameter)
            rows = grad.new_zeros(tasks, grad.numel())
            rows[task] = grad.reshape(-1)
            matrices[parameter] = rows
    sums = {other: rows.sum(0) for other, rows in common.items()}
    # Of its own: autograd may give one tensor to several.
    sums |= {other: grad.clone() for other, (_, grad) in own.items()}
    for other, added in sums.items():
        other.grad = accumulate(other.grad, added.contiguous())
    return TogetherGradients(matrices, tasks)
