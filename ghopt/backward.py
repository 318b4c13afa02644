"""One backward pass per task: what the passes leave in ``.grad``, task by task.

``.backward()`` is used, not :func:`torch.autograd.grad`: the latter silently returns
nothing under FSDP2 and reentrant checkpointing and for parameters that nobody listed,
and skips hooks. With ``.grad`` None before a pass, autograd hands its own tensor over,
so collecting the gradients copies nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ghopt.distributed import Ranks, local, placed_as
from ghopt.geometry import Weighting, gh
from ghopt.gradients import gramian
from ghopt.losses import Losses, named_losses, warn_of_many, weighted_sum

BackwardFn: TypeAlias = Callable[..., object]
"""What runs one pass: called as ``backward_fn(loss, retain_graph=...)``."""

Collected: TypeAlias = dict[Tensor, Tensor]
"""Gradients of one task by parameter; parameters that it does not reach are absent."""


def check_weighting(weighting: object) -> None:
    """Refuse what maps something else than a Gramian to something else than weights.

    Raises:
        TypeError: if ``weighting`` is not callable, or an aggregator of TorchJD, which
            maps a Jacobian ``[K, N]`` to a gradient ``[N]``: with a Gramian it runs, too.
    """
    if not callable(weighting):
        raise TypeError(f"weighting must be callable, got {weighting!r}")
    kinds = {
        kind.__name__
        for kind in type(weighting).__mro__
        if kind.__module__.startswith("torchjd.")
    }
    if "Aggregator" in kinds:
        name = type(weighting).__name__
        raise TypeError(
            f"weighting must map a Gramian to weights, got the aggregator {name}(): pass "
            f"{name}Weighting()"
        )


def weigh(weighting: Weighting, gramian: Tensor) -> Tensor:
    """Apply a weighting and check what it returns.

    Returns:
        Weights, shape ``[K]``, float64 and detached, on the device of the Gramian, in
        memory of their own: ranks write the weights of the first rank to it.

    Raises:
        TypeError: if ``weighting`` returns no tensor, or is none: see
            :func:`check_weighting`.
        ValueError: if it returns another shape than ``[K]``, complex numbers or
            integers, or weights on another device or that require grad.
    """
    check_weighting(weighting)
    with torch.no_grad():
        weights = weighting(gramian)
    if not isinstance(weights, Tensor):
        raise TypeError(f"weighting must return a tensor, got {type(weights)}")
    if weights.shape != gramian.shape[:1] or not weights.is_floating_point():
        expected = f"floating point of shape {list(gramian.shape[:1])}"
        given = f"{weights.dtype} of shape {list(weights.shape)}"
        raise ValueError(f"weighting must return {expected}, got {given}")
    if weights.device != gramian.device:
        devices = f"{gramian.device}, got {weights.device}"
        raise ValueError(f"weighting must return weights on {devices}")
    if weights.requires_grad:
        raise ValueError(
            "weighting must return weights without grad, got requires_grad"
        )
    return weights.to(gramian, copy=True)


@contextmanager
def set_aside(parameters: Sequence[Tensor]) -> Iterator[list[Tensor | None]]:
    """Take ``.grad`` off the parameters; on an exception put it back as it was.

    Yields:
        What was in ``.grad``. Without an exception it is the caller's to put back.
    """
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield before
    except BaseException:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad
        raise


@contextmanager
def out_of_reach(grads: Iterable[Tensor | None]) -> Iterator[None]:
    """Give gradients their values back that lie in memory of a DDP model, at the end.

    Each pass that such a model averages writes to its buckets, and ``.grad`` may be a
    view of them. Elsewhere a view lies in some memory of the user's, and is left alone.
    """
    lent = dist.is_available() and dist.is_initialized()
    views = [grad for grad in grads if lent and grad is not None and grad._is_view()]
    values = [view.clone() for view in views]
    try:
        yield
    finally:
        with torch.no_grad():
            for view, value in zip(views, values, strict=True):
                view.copy_(value)


@contextmanager
def _left_alone(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Refuse passes that use up the gradients which they make.

    Some train without keeping gradients: an optimizer per parameter steps in a hook,
    inside the backward pass. Then the pass of the first task trains on its gradient alone,
    and those of the others meet other parameters.

    Raises:
        RuntimeError: if a parameter has changed, or a hook took its gradient away.
    """
    versions = [parameter._version for parameter in parameters]
    taken: list[Tensor] = []

    def note(parameter: Tensor) -> None:
        if parameter.grad is None:
            taken.append(parameter)

    handles = [
        parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]  # torch's
        for parameter in parameters
        if parameter._post_accumulate_grad_hooks
    ]

    def check(error: Exception | None = None) -> None:
        for place, (p, version) in enumerate(zip(parameters, versions, strict=True)):
            if p._version == version and not any(p is one for one in taken):
                continue
            what = "changed" if p._version != version else "lost its gradient to a hook"
            raise RuntimeError(
                f"a parameter, number {place} of shape {list(p.shape)}, {what} during the "
                "backward passes of the tasks: an optimizer that steps inside backward "
                "(optimizer-in-backward) cannot be harmonized; take its hooks away"
            ) from error

    try:
        yield
    except Exception as error:
        check(error)
        raise
    finally:
        for handle in handles:
            handle.remove()
    check()


def collect(
    losses: Sequence[Tensor],
    parameters: Sequence[Tensor],
    summed: Sequence[Tensor],
    collected: Sequence[Collected],
    *,
    retain_graph: bool,
    backward_fn: BackwardFn | None,
    ranks: Ranks | None = None,
    outside: Sequence[Tensor] = (),
) -> None:
    """Run one backward pass per loss and add the gradients to those of its task.

    The graph is freed by the last pass unless ``retain_graph``. A loss that does not
    require grad has no pass. Parameters other than these receive the plain sum, from
    autograd itself.

    Args:
        losses: K scalars.
        parameters: those whose gradients are kept apart; their ``.grad`` is None.
        summed: those that receive the plain sum, and must not share memory either.
        collected: K dictionaries, empty or from earlier micro-batches; added to in
            place. After an exception they are in an undefined state.
        retain_graph: keep the graph after the last pass.
        backward_fn: runs a pass, ``loss.backward`` if None.
        ranks: those that average the gradients of each task, while the passes of the
            next ones run, and at last those of ``summed`` and ``outside``.
        outside: parameters other than these.
    """
    with _left_alone([*parameters, *summed]):
        averages = _run_all(
            losses, parameters, summed, collected, retain_graph, backward_fn, ranks
        )
    beside = [*summed, *outside]
    if ranks is None or not beside:
        sums = {}
    else:
        sums = {p: p.grad for p in beside if p.grad is not None}
        averages.append(ranks.average(sums, of_all_tasks=True))
    for end in averages:
        end()
    for parameter, mean in sums.items():
        parameter.grad = mean


def _run_all(
    losses: Sequence[Tensor],
    parameters: Sequence[Tensor],
    summed: Sequence[Tensor],
    collected: Sequence[Collected],
    retain_graph: bool,
    backward_fn: BackwardFn | None,
    ranks: Ranks | None,
) -> list[Callable[[], None]]:
    """Run the passes of :func:`collect`; give what waits for the averages."""
    last = max(task for task, loss in enumerate(losses) if loss.requires_grad)
    places: set[tuple[int, int]] = set()
    apart = {parameter for parameter in summed if parameter.grad is not None}
    averages = []
    for task, (loss, gradients) in enumerate(zip(losses, collected, strict=True)):
        if loss.requires_grad:
            # Where there are earlier gradients autograd adds to them in place.
            for parameter in parameters:
                parameter.grad = gradients.pop(parameter, None)
            _run(loss, retain_graph or task != last, backward_fn)
            for parameter in parameters:
                if parameter.grad is not None:
                    gradients[parameter] = _own(parameter.grad, parameter, places)
                    parameter.grad = None
            for parameter in summed:
                if parameter.grad is not None and parameter not in apart:
                    parameter.grad = _own(parameter.grad, parameter, places)
                    apart.add(parameter)
        if ranks is not None:
            averages.append(ranks.average(gradients))
    return averages


def _run(loss: Tensor, retain_graph: bool, backward_fn: BackwardFn | None) -> None:
    """Run one backward pass."""
    try:
        if backward_fn is not None:
            backward_fn(loss, retain_graph=retain_graph)
        else:
            loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise RuntimeError(
                "the graph of these losses is gone: a backward pass ran through it before, "
                "as loss.backward() or an earlier backward([...]). Drop that call: with "
                "retain_graph=True its plain gradient would be added to the harmonized "
                "one. If you want both, keep the graph there. torch says: " + str(error)
            ) from error
        # A model compiled when its graph was not kept has its backward pass write into
        # what the forward pass saved, which a second pass would need.
        if "donated buffers" not in str(error):
            raise
        raise RuntimeError(
            "a compiled model gave away buffers that the passes of later tasks need: set "
            "torch._functorch.config.donated_buffer = False before compiling, and keep "
            "torch._inductor.config.fx_graph_cache = False or delete that cache once: it "
            "hands out graphs compiled under either setting"
        ) from error


def _own(gradient: Tensor, parameter: Tensor, places: set[tuple[int, int]]) -> Tensor:
    """Copy a gradient that shares memory, with a DDP bucket, say, or another task's."""
    gradient = placed_as(gradient, parameter)
    if gradient.layout is not torch.strided:
        return gradient
    # Of the storage, not of the first element: parts of one tensor may overlap. Shards
    # do not, and FSDP2 cuts all of a pass from one storage.
    shard = local(gradient)
    offset = 0 if shard is gradient else int(shard.storage_offset())
    place = shard.untyped_storage()._cdata, offset
    if gradient._is_view() or place in places:
        gradient = gradient.clone()
        place = local(gradient).untyped_storage()._cdata, 0
    places.add(place)
    return gradient


def harmonized_loss(
    losses: Losses, params: Iterable[Tensor], weighting: Weighting = gh
) -> Tensor:
    """Sum the losses with the weights of a rule: the equivalent model (eq. 44 and 45).

    For loops whose optimizer cannot be changed: call ``.backward()`` on the result. The
    weights are measured on ``params`` and constant, so the gradient of ``params`` is the
    harmonized one. Costs one backward pass per task for measuring and one more for the
    result; :class:`ghopt.HarmonizedOptimizer` saves the latter.

    The authors measure on the shared network and weigh the losses with the result for
    *all* parameters, as this function does when ``params`` are the shared ones. Mind
    that a task with a tiny gradient there can get a weight in the thousands, which its
    head then feels undiminished: training has diverged from it.

    Gradients are taken with :func:`torch.autograd.grad`, so ``.grad`` and hooks that
    accumulate are left alone; reentrant checkpointing and FSDP2 do not work, and under
    DDP the weights are those of each rank's own gradients.

    Args:
        losses: one scalar per task, as for ``HarmonizedOptimizer.backward``.
        params: parameters over which the Gramian is taken. One that is given twice
            counts once.
        weighting: from a Gramian, shape ``[K, K]``, to weights, shape ``[K]``.

    Returns:
        Scalar with the graph of all losses.

    Raises:
        TypeError: as :func:`named_losses` and :func:`weigh` do, or if ``params`` are
            no parameters.
        ValueError: likewise, or if no loss reaches any of ``params``.
    """
    tasks = list(named_losses(losses).values())
    warn_of_many(tasks)
    wanted = trained(params)
    products = gramian(task_gradients(tasks, wanted))
    return weighted_sum(tasks, weigh(weighting, products))


def trained(params: Iterable[Tensor]) -> list[Tensor]:
    """List the parameters that require grad, each once.

    Raises:
        TypeError: if ``params`` are no parameters.
    """
    if isinstance(params, nn.Module | Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            f"params must be an iterable of parameters, got {type(params)}: pass "
            "model.parameters()"
        )
    return list(dict.fromkeys(param for param in params if param.requires_grad))


def task_gradients(
    losses: Sequence[Tensor], params: Sequence[Tensor]
) -> list[Sequence[Tensor | None]]:
    """Take the gradients of each loss, and leave ``.grad`` and the graph alone.

    Returns:
        One list per loss, one entry per parameter; None where it does not reach one.

    Raises:
        ValueError: if no loss reaches any of ``params``.
    """
    gradients = [_gradients(loss, params) for loss in losses]
    if all(gradient is None for task in gradients for gradient in task):
        raise ValueError(f"params must hold one that a loss reaches, got {len(params)}")
    return gradients


def _gradients(loss: Tensor, params: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not loss.requires_grad or not params:
        return [None] * len(params)
    return torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
