"""One backward pass per task, and the custody of ``.grad`` meanwhile.

``.backward()`` runs the passes of a training, not :func:`torch.autograd.grad`: the latter
silently returns nothing under FSDP2 and reentrant checkpointing and for parameters that
nobody listed, and skips hooks. With ``.grad`` None before a pass, autograd hands its own
tensor over, so collecting the gradients copies nothing. Where ``.grad`` and the graph must
stay as they are, in :func:`taken`, it is the other way round.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ghopt.compiled import refuse_donated
from ghopt.forms import local, placed_as
from ghopt.gradients import StoredGradients
from ghopt.gradients.sums import accumulate
from ghopt.ranks import Alone, Ranks

BackwardFn: TypeAlias = Callable[..., object]
"""What runs one pass: called as ``backward_fn(loss, retain_graph=...)``."""

RunPass: TypeAlias = Callable[[str, Tensor, bool], object]
"""What runs the pass of a task: called with its name, its loss and ``retain_graph``."""


class Roles(NamedTuple):
    """What each parameter receives.

    Attributes:
        harmonized: the weighted sum.
        summed: the plain sum; these are in the optimizer, too.
        outside: the plain sum; in no optimizer that we know of, but in a DDP model whose
            gradients are to be averaged.
    """

    harmonized: list[Tensor]
    summed: list[Tensor]
    outside: list[Tensor]

    @property
    def own(self) -> list[Tensor]:
        """Those of the optimizer, whose ``.grad`` is in our custody."""
        return [*self.harmonized, *self.summed]


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
def keeping_bucket_views(grads: Iterable[Tensor | None]) -> Iterator[None]:
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


def put_back(
    parameters: Iterable[Tensor],
    grads: Iterable[Tensor | None],
    added: Mapping[Tensor, Tensor],
) -> None:
    """Put the earlier ``.grad`` back, and add the new gradients to it."""
    for parameter, grad in zip(parameters, grads, strict=True):
        more = added.get(parameter)
        parameter.grad = more if grad is None else accumulate(grad, more)


class _Watch:
    """Sees optimizers that step inside backward, parameter by parameter, in hooks.

    They use up the gradients as they are made: the pass of the first task would train on
    its gradient alone, and those of the others meet other parameters. Where a parameter
    has changed but kept its gradient, and has no hook, something else did it, which torch
    allows: an embedding that renormalizes in a checkpoint, another thread.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._versions = [parameter._version for parameter in parameters]
        self._hooked = [p for p in parameters if p._post_accumulate_grad_hooks]
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]  # torch's
            for parameter in self._hooked
        ]
        self._taken: list[Tensor] = []

    def _note(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            self._taken.append(parameter)

    def check(self, error: Exception | None = None) -> None:
        """Refuse what was seen up to now, before the gradients are taken.

        Raises:
            RuntimeError: if a parameter lost its gradient to a hook, or changed and has a
                hook or no gradient.
        """
        versions = [parameter._version for parameter in self._parameters]
        if versions == self._versions and not self._taken:
            return
        pairs = zip(self._parameters, versions, self._versions, strict=True)
        for place, (parameter, new, old) in enumerate(pairs):
            # By identity: tensors compare their elements.
            hooked = any(parameter is one for one in self._hooked)
            changed = new != old and (hooked or parameter.grad is None)
            if changed or any(parameter is one for one in self._taken):
                raise RuntimeError(
                    f"a parameter, number {place} of shape {list(parameter.shape)}, was "
                    "changed or lost its gradient during the backward passes of the tasks: "
                    "an optimizer that steps inside backward (optimizer-in-backward) "
                    "cannot be harmonized; take its hooks away"
                ) from error

    def end(self) -> None:
        """Take our hooks away."""
        for handle in self._handles:
            handle.remove()


def run_passes(
    losses: Mapping[str, Tensor],
    gradients: StoredGradients,
    roles: Roles,
    *,
    run: RunPass,
    retain_graph: bool,
    ranks: Alone | Ranks,
) -> None:
    """Run one backward pass per loss and add the gradients to those of its task.

    The graph is freed by the last pass unless ``retain_graph``. A loss that does not
    require grad has no pass. Parameters other than the harmonized ones receive the plain
    sum in ``.grad``, from autograd itself.

    Args:
        losses: K scalars by name.
        gradients: empty or from earlier micro-batches; added to. After an exception they
            are in an undefined state.
        roles: before, the ``.grad`` of the harmonized parameters is None. After, no two
            gradients of the harmonized and the summed ones share memory.
        run: runs a pass, see :func:`runner`.
        retain_graph: keep the graph after the last pass.
        ranks: average the gradients of each task, while the passes of the next ones run,
            and at last those of the other parameters.
    """
    watch = _Watch(roles.own)
    try:
        with with_cure():
            averages = _run_all(
                losses, gradients, roles, run, retain_graph, ranks, watch
            )
    except Exception as error:
        watch.check(error)
        raise
    finally:
        watch.end()
    others = [*roles.summed, *roles.outside]
    sums = {p: p.grad for p in others if p.grad is not None}
    if others:
        averages.append(ranks.average(sums, of_all_tasks=True))
    for end in averages:
        end()
    for parameter, mean in sums.items():
        parameter.grad = mean


def _run_all(
    losses: Mapping[str, Tensor],
    gradients: StoredGradients,
    roles: Roles,
    run: RunPass,
    retain_graph: bool,
    ranks: Alone | Ranks,
    watch: _Watch,
) -> list[Callable[[], None]]:
    """Run the passes of :func:`run_passes`; give what waits for the averages."""
    # In the order of all tasks, in which ranks send, with those that have no loss here.
    live = [n for n in gradients.names if n in losses and losses[n].requires_grad]
    retaining = live if retain_graph else live[:-1]
    refuse_donated(losses[name] for name in retaining)
    places: set[tuple[int, int]] = set()
    apart = {parameter for parameter in roles.summed if parameter.grad is not None}
    averages = []
    for name in gradients.names:
        of_task = gradients[name]
        if name in live:
            # Where there are earlier gradients autograd adds to them in place.
            for parameter in roles.harmonized if of_task else ():
                parameter.grad = of_task.pop(parameter, None)
            run(name, losses[name], name in retaining)
            watch.check()
            of_task.update(_taken_off(roles.harmonized, places))
            for parameter in roles.summed:
                if parameter.grad is not None and parameter not in apart:
                    parameter.grad = _own(parameter.grad, parameter, places)
                    apart.add(parameter)
        averages.append(ranks.average(of_task))
    return averages


def _taken_off(
    parameters: Iterable[Tensor], places: set[tuple[int, int]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Take ``.grad`` off the parameters, each gradient with memory of its own."""
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None:
            parameter.grad = None
            yield parameter, _own(grad, parameter, places)


def runner(backward_fn: BackwardFn | None) -> RunPass:
    """Give what runs the pass of a task: ``backward_fn``, or else ``loss.backward``."""

    def run(_: str, loss: Tensor, retain_graph: bool) -> None:
        if backward_fn is not None:
            backward_fn(loss, retain_graph=retain_graph)
        else:
            loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's

    return run


@contextmanager
def with_cure() -> Iterator[None]:
    """Name the cure where the graph is gone."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            "the graph of these losses is gone: a backward pass ran through it before, as "
            "loss.backward() or an earlier backward([...]). Drop that call: with "
            "retain_graph=True its plain gradient would be added to the harmonized one. If "
            "you want both, keep the graph there. If there is no such call, the losses "
            "reach a tensor of an earlier step, as the state of an RNN: detach() it. torch "
            f"says: {error}"
        ) from error


def _own(gradient: Tensor, parameter: Tensor, places: set[tuple[int, int]]) -> Tensor:
    """Copy a gradient that shares memory, with a DDP bucket, say, or another task's."""
    if type(gradient) is not Tensor:
        gradient = placed_as(gradient, parameter)
    if gradient.layout is not torch.strided:
        return gradient
    place = _place(gradient)
    if place in places or gradient._is_view():
        gradient = gradient.clone()
        place = _place(gradient)
    places.add(place)
    return gradient


def _place(gradient: Tensor) -> tuple[int, int]:
    """Tell gradients apart that share no memory."""
    shard = gradient if type(gradient) is Tensor else local(gradient)
    # Shards do not overlap, and FSDP2 cuts all of a pass from one storage.
    offset = 0 if shard is gradient else int(shard.storage_offset())
    # By the storage, not the first element: parts of one tensor may overlap. At its start
    # both have one address, which takes less to ask for.
    if type(shard) is Tensor:
        is_first = shard.storage_offset() == 0
        start = shard if is_first else shard.untyped_storage()
        return start.data_ptr(), offset
    return shard.untyped_storage()._cdata, offset


def taken(losses: Mapping[str, Tensor], params: Iterable[Tensor]) -> StoredGradients:
    """Take the gradients of each loss, and leave ``.grad`` and the graph alone.

    Raises:
        TypeError: if ``params`` are no parameters.
        ValueError: if no loss reaches any of ``params``.
        RuntimeError: see :func:`refuse_donated`.
    """
    wanted = trained(params)
    gradients = StoredGradients(losses, wanted)
    refuse_donated(losses.values())
    for name, loss in losses.items():
        if loss.requires_grad and wanted:
            found = torch.autograd.grad(
                loss, wanted, retain_graph=True, allow_unused=True
            )
            pairs = zip(wanted, found, strict=True)
            gradients[name].update({p: g for p, g in pairs if g is not None})
    if not gradients:
        raise ValueError(f"params must hold one that a loss reaches, got {len(wanted)}")
    return gradients


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
