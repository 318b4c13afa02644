"""Any torch optimizer, stepping on harmonized gradients: ``HarmonizedOptimizer``.

The class is the contract of :class:`torch.optim.Optimizer` around the floors below. What
that contract asks of a wrapper, and where it would break without an error, gives it its
form:

* ``param_groups``, ``state`` and ``defaults`` are properties on the base optimizer.
  Aliases would go stale at the first ``load_state_dict``, which replaces them.
* ``Optimizer.__init__`` is not called: it would make groups and state of its own.
* All that changes lives in one object that is changed in place. Lightning and Fabric run
  these methods on a proxy with our attributes, where an attribute set anew would stay.
* No list of parameters outlives a call: Accelerate swaps parameters inside the groups.
* Nothing is kept in ``state``: AdamW takes a filled ``state[p]`` for an initialised one.
* Public names are forwarded to the base (``train`` and ``eval`` of schedule-free ones),
  private ones never: with ``_step_supports_amp_scaling`` shown, GradScaler would leave
  it to us to unscale the gradients.
"""

import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ghopt.backward import (
    BackwardFn,
    Collected,
    Losses,
    as_in_total,
    collect,
    named_losses,
    out_of_reach,
    set_aside,
    weigh,
    weighted_sum,
)
from ghopt.deferred import Deferral, defer
from ghopt.distributed import (
    Ranks,
    SyncGroup,
    beside,
    check_replicas,
    ddp_models,
    process_group,
    together,
)
from ghopt.geometry import Weighting, cosines, gh
from ghopt.gradients import combine, gramian, gramian_over

Closure: TypeAlias = Callable[[], Any]
"""Evaluates the model; returns a number, a scalar tensor or the losses of the tasks."""


@dataclass(frozen=True)
class Harmonization:
    """What one ``backward`` found and did. Reading a value waits for the device.

    Attributes:
        names: of the tasks, in the order of the rows below.
        gramian: inner products of the task gradients before harmonization, over the
            shared parameters, shape ``[K, K]``, float64.
        weights: of the task gradients in the update (tau), shape ``[K]``, float64.
    """

    names: tuple[str, ...]
    gramian: Tensor
    weights: Tensor

    @property
    def cosines(self) -> Tensor:
        """Cosines between the task gradients, shape ``[K, K]``; 0 with a zero one."""
        return cosines(self.gramian)


GramianOf: TypeAlias = Callable[[Iterable[Tensor]], Tensor]
"""Inner products of the task gradients over some parameters, ``[K, K]``, float64."""

HarmonizeHook: TypeAlias = Callable[[Harmonization, GramianOf], None]
"""What :meth:`HarmonizedOptimizer.register_harmonize_hook` takes."""


@dataclass
class _Progress:
    """All that changes between calls: see the module's docstring.

    Attributes:
        collected: gradients of the shared parameters that await the last micro-batch,
            by the name of the task.
        summed: those of the other parameters, of all tasks.
        last: what the last harmonization found and did.
        calls: of ``backward`` that several ranks may concern.
        models: the DDP models of the parameters, as last looked for.
        age: number of backward calls that the weights in ``last`` have served.
    """

    collected: dict[str, Collected] = field(default_factory=dict)
    summed: Collected = field(default_factory=dict)
    last: Harmonization | None = None
    calls: int = 0
    models: list[weakref.ref[DistributedDataParallel]] = field(default_factory=list)
    age: int = 0

    def forget(self) -> None:
        """Drop a started accumulation."""
        self.collected.clear()
        self.summed.clear()

    def take(self, names: list[str]) -> tuple[list[Collected], Collected]:
        """Hand over a started accumulation of these tasks, and the sums.

        Raises:
            ValueError: if it is one of other tasks.
        """
        if self.collected and self.collected.keys() != {*names}:
            raise ValueError(
                f"losses must be those of tasks {[*self.collected]}, got {names}"
            )
        taken = [self.collected.get(name, {}) for name in names], dict(self.summed)
        self.forget()
        return taken

    def keep(
        self,
        names: Iterable[str],
        collected: Iterable[Collected],
        summed: Mapping[Tensor, Tensor | None],
    ) -> None:
        """Keep the gradients of one more micro-batch, with those before it."""
        self.collected.update(zip(names, collected, strict=True))
        self.summed.update({p: g for p, g in summed.items() if g is not None})


class HarmonizedOptimizer(Optimizer):
    """Wrap an optimizer so that it steps on harmonized task gradients.

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = HarmonizedOptimizer(torch.optim.AdamW(model.parameters()))
    >>> out = model(torch.ones(4, 2))
    >>> optimizer.zero_grad()
    >>> optimizer.backward([out.square().mean(), (out - 1).abs().mean()])
    >>> optimizer.step()

    Everything else is the base optimizer's: groups, state, schedulers, checkpoints. Use
    this object, not the base, for ``GradScaler.unscale_`` and ``GradScaler.step``.

    Args:
        base_optimizer: takes the step; any :class:`torch.optim.Optimizer`.
        weighting: from the Gramian of the task gradients, ``[K, K]`` in float64, to
            their weights, ``[K]``. ``ghopt.gh``, the default, never opposes a task.
        shared_params: those over which the Gramian is taken and which receive the
            weighted sum; the other parameters of the optimizer receive the plain sum.
            By default all parameters of the optimizer are shared. What is remembered is
            their place in the groups, where a parameter may be replaced by another.
        measure_every: measure the conflict in every so many calls of ``backward`` (of
            the whole accumulation, if there is one), and in between run a single
            pass of the losses summed with the last weights: the paper's equivalent
            model (eq. 44 and 45). 1, the default, is exact. With more the weights are
            those of earlier parameters and data, *all* parameters that the losses reach
            receive the weighted sum, also those outside this optimizer, and the update
            may oppose a task. Other tasks than before are measured anew; so are the
            first ones after a checkpoint is loaded, which does not hold the weights.
            Weights that were not finite serve as 1.
        deferred: on the CPU, make the weight gradients of linear layers once for all
            tasks where the layer has so few rows (batch x positions) that this is less
            work and memory. The result is the same. What can be deferred is found anew
            at each step in the graph of the losses: a weight that serves for anything
            else, that is hooked or that is not plain float32 or float64 takes the
            ordinary way; so do all with ``backward_fn`` or ``accumulate_only``, under
            autocast, with a process group, and in checkpoints and compiled models. (One
            use is not seen: a hook on a transposed weight of your own.)

    Attributes:
        base_optimizer: as given.
        weighting: as given.
        measure_every: as given.
        deferred: as given.

    Raises:
        TypeError: if ``base_optimizer`` is no optimizer, ``weighting`` not callable or
            ``shared_params`` no iterable of parameters, ``measure_every`` no whole number.
        ValueError: if ``shared_params`` is empty or holds one that is not in
            ``base_optimizer``, or ``measure_every`` is less than 1, or more with
            ``shared_params``: one pass cannot give both sums.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        weighting: Weighting = gh,
        *,
        shared_params: Iterable[Tensor] | None = None,
        measure_every: int = 1,
        deferred: bool = False,
    ) -> None:
        if not isinstance(base_optimizer, Optimizer):
            given = type(base_optimizer)
            raise TypeError(f"base_optimizer must be a torch Optimizer, got {given}")
        if not callable(weighting):
            raise TypeError(f"weighting must be callable, got {weighting!r}")
        if not isinstance(measure_every, int):
            raise TypeError(f"measure_every must be an int, got {measure_every!r}")
        if measure_every < 1:
            raise ValueError(f"measure_every must be at least 1, got {measure_every}")
        if measure_every > 1 and shared_params is not None:
            given = f"got {measure_every}"
            raise ValueError(f"measure_every must be 1 with shared_params, {given}")
        self.base_optimizer = base_optimizer
        self.weighting = weighting
        self.measure_every = measure_every
        self.deferred = deferred
        self._shared = None if shared_params is None else self._places(shared_params)
        self._set_up()

    def backward(
        self,
        losses: Losses,
        *,
        total: Tensor | None = None,
        retain_graph: bool = False,
        backward_fn: BackwardFn | None = None,
        accumulate_only: bool = False,
        sync_group: SyncGroup | None = None,
    ) -> None:
        """Run one backward pass per task and add the harmonized gradient to ``.grad``.

        In place of ``sum(losses).backward()``, and like it: gradients add to what is in
        ``.grad``, a parameter that no task reaches keeps its ``.grad`` (None, if so),
        parameters outside this optimizer receive the plain sum. The last pass frees the
        graph that it runs through; what only earlier losses use lives as long as they.

        An exception leaves the ``.grad`` of this optimizer's parameters as it was and
        drops what was collected. (Parameters outside keep the passes that finished, as
        after any failing ``backward``.)

        Args:
            losses: one real scalar per task: a mapping from names, a list or other
                iterable, or a 1-D tensor. With weights of your own already in them.
            total: a scalar made of the losses, by a framework that scales or divides
                it: each loss counts with the factor with which it enters the total.
                Nothing else that requires grad may be in it, and no loss be computed
                from another.
            retain_graph: keep the graph after the last pass.
            backward_fn: runs each pass in place of ``loss.backward``, called as
                ``backward_fn(loss, retain_graph=...)``.
            accumulate_only: keep the gradients of the tasks apart, to be added to those
                of the next call, and leave ``.grad`` alone. For all micro-batches but
                the last: harmonizing each by itself is another algorithm. ``step`` and
                ``zero_grad`` of this optimizer drop what was kept; those of the model
                or of the base optimizer cannot.
            sync_group: average the gradients of each task over these ranks before they
                are harmonized: a DDP model, with this call *and* the forward pass
                inside its ``no_sync()``; or a process group, or True for the default
                one. Nothing is sent where ``accumulate_only``. With a model, its
                parameters outside this optimizer are averaged, too, and parameters may
                stand in the groups in any order. DTensors whose mesh holds these ranks
                (FSDP2) are averaged already. All ranks take the weights of the first.
                False: leave the gradients of each rank as they are, on purpose.

        Raises:
            TypeError: if ``losses`` is not iterable, a loss or ``total`` no tensor,
                ``backward_fn`` not callable, ``sync_group`` nothing of the above, or
                the weighting returns no tensor.
            ValueError: if there is no loss, one is not a real scalar, none requires
                grad, the tasks are not those of the micro-batches before or of the
                other ranks, ``total`` is not made of the losses, no loss reaches a
                (shared) parameter of this optimizer, the weighting returns anything but
                K weights, there is no process group or it is a model that cannot be
                used.
            RuntimeError: if a pass fails, with its cure if a compiled model fails for
                donated buffers; if another rank fails or does not come; if a DDP model
                of the parameters would average the first pass only, or none.
        """
        if backward_fn is not None and not callable(backward_fn):
            raise TypeError(f"backward_fn must be callable, got {backward_fn!r}")
        # By identity: a compiled module cannot say whether it is true.
        group = None if sync_group is False else sync_group
        if group is not None:
            process_group(group)
        shared, rest = self._parameters()
        outside = beside(group, [*shared, *rest])
        talks = nullcontext() if group is None or accumulate_only else together(group)
        with talks as ranks:
            named = named_losses(losses)
            if total is not None:
                named = as_in_total(named, total)
            reused = self._reusable(named)
            if reused:
                named = _in_one(named, reused)
            if (
                group is not None
                or sum(loss.requires_grad for loss in named.values()) > 1
            ):
                self._check_replicas(
                    [*shared, *rest],
                    averaged=group is not None or accumulate_only,
                    unasked=sync_group is None,
                )
            if ranks is not None:
                ranks.agree([*named], shared, [*rest, *outside])
            # From here on held by this frame alone, so that an exception drops them.
            collected, summed = self._progress.take([*named])
            deferral = None
            if self.deferred and backward_fn is None and not accumulate_only:
                deferral = defer([*named.values()], shared)
            with set_aside([*shared, *rest]) as grads:
                for parameter in rest:
                    parameter.grad = summed.pop(parameter, None)
                with out_of_reach(grads):
                    collect(
                        list(named.values()),
                        shared,
                        rest,
                        collected,
                        retain_graph=retain_graph,
                        backward_fn=deferral.backward if deferral else backward_fn,
                        ranks=ranks,
                        outside=outside,
                    )
                if deferral and not deferral.settle(collected):
                    deferral = None
                if not (deferral or any(collected)):
                    which = "parameter" if self._shared is None else "shared parameter"
                    raise ValueError(
                        f"losses must reach a {which} of this optimizer, got none"
                    )
                sums = [parameter.grad for parameter in rest]
                if accumulate_only:
                    added: list[Tensor | None] = [None] * len(grads)
                elif reused:
                    if ranks is not None:
                        ranks.settle(reused.weights)
                    added = [collected[0].get(parameter) for parameter in shared] + sums
                else:
                    weighted = self._harmonize(
                        [*named], shared, collected, ranks, deferral
                    )
                    added = weighted + sums
                for parameter, grad, more in zip(
                    [*shared, *rest], grads, added, strict=True
                ):
                    parameter.grad = _accumulate(grad, more)
        if accumulate_only:
            self._progress.keep(named, collected, dict(zip(rest, sums, strict=True)))
        else:
            self._progress.age = self._progress.age + 1 if reused else 1

    def step(  # type: ignore[override]  # one more way to call it than the base class
        self,
        closure: Closure | None = None,
        *,
        losses: Losses | None = None,
    ) -> float | None:
        """Step the base optimizer on the gradients in ``.grad``.

        Args:
            closure: handed to the base optimizer, for bases that evaluate more than
                once. It calls ``backward`` of this optimizer and returns a number, or
                it returns the losses (a list, tuple, mapping or 1-D tensor): then
                ``zero_grad()`` and ``backward(losses)`` follow, and the base is given
                their sum.
            losses: as for ``backward``: a shorthand for ``zero_grad()``,
                ``backward(losses)``, ``step()``. With several ranks, as with a closure
                that returns losses, call them one by one, for ``sync_group``.

        Returns:
            What the base optimizer returns.

        Raises:
            TypeError: if ``closure`` is not callable.
            ValueError: if both ``closure`` and ``losses`` are given.
        """
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        kwargs: dict[str, Any] = {} if losses is None else {"losses": losses}
        with torch.autograd.profiler.record_function(
            f"Optimizer.step#{type(self).__name__}.step"
        ):
            for pre_hook in self._optimizer_step_pre_hooks.values():
                changed = pre_hook(self, args, kwargs)
                if changed is None:
                    continue
                if not isinstance(changed, tuple) or len(changed) != 2:
                    raise RuntimeError(
                        "a step pre-hook must return None or a tuple of "
                        f"(new_args, new_kwargs), but got {changed}"
                    )
                args, kwargs = changed
            result = self._step(*args[1:], **kwargs)
            for post_hook in self._optimizer_step_post_hooks.values():
                post_hook(self, args, kwargs)
        return result

    # torch hooks the step of every optimizer class. The base's own is hooked already:
    # hooking this one too would run the global hooks twice.
    step.hooked = True  # type: ignore[attr-defined]

    def register_harmonize_hook(self, hook: HarmonizeHook) -> RemovableHandle:
        """Have a hook called in each ``backward`` that measures, before it combines.

        It is called as ``hook(found, gramian_of)``: what ``last`` will be, and a function
        from parameters to the inner products of the task gradients over these alone,
        ``[K, K]`` in float64, zeros where there is no gradient; for shards of DTensors
        it must be called on all ranks alike. It holds the gradients and must not be
        kept. An exception in the hook is one of ``backward``, on this rank alone.

        As in torch, hooks are not copied and not pickled.

        Returns:
            A handle whose ``remove()`` takes the hook away.
        """
        handle = RemovableHandle(self._harmonize_hooks)
        self._harmonize_hooks[handle.id] = hook
        return handle

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` as the base optimizer does, and any started accumulation."""
        self._progress.forget()
        self.base_optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Give the state of the base optimizer: nothing is added to it.

        So it loads into a base optimizer without this wrapper, and the reverse.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.base_optimizer.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the base optimizer, and drop any started accumulation."""
        state_dict = state_dict.copy()  # as torch does: hooks may change it
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.base_optimizer.load_state_dict(state_dict)
        self._progress.forget()
        self._progress.age = 0
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @property
    def last(self) -> Harmonization | None:
        """What the last ``backward`` that harmonized found and did; None before it."""
        return self._progress.last

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the base optimizer."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of the base optimizer."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the base optimizer."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        """Forward unknown public names to the base optimizer."""
        # base_optimizer itself is unknown while unpickling.
        if name.startswith("_") or "base_optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(self.base_optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        """Give what a copy needs: as in torch, hooks stay behind."""
        kept = ("base_optimizer", "weighting", "measure_every", "deferred", "_shared")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`__getstate__` gave."""
        self.__dict__.update(state)
        self._set_up()

    def __repr__(self) -> str:
        """Show the weighting and the base optimizer."""
        weighting = getattr(self.weighting, "__name__", repr(self.weighting))
        return f"{type(self).__name__}(weighting={weighting}, {self.base_optimizer!r})"

    def _set_up(self) -> None:
        """Start without progress and hooks, of which torch expects these six kinds."""
        self._progress = _Progress()
        self._harmonize_hooks: OrderedDict[int, HarmonizeHook] = OrderedDict()
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()

    def _step(
        self,
        closure: Closure | None = None,
        *,
        losses: Losses | None = None,
    ) -> float | None:
        if closure is not None and not callable(closure):
            given = f"{type(closure)} (losses are given by keyword)"
            raise TypeError(f"closure must be callable, got {given}")
        if losses is not None:
            if closure is not None:
                raise ValueError(
                    "closure must be None where losses are given, got both"
                )
            named = named_losses(losses)  # before zero_grad: an error changes nothing
            self.zero_grad()
            self.backward(named)
        try:
            if closure is None:
                return self.base_optimizer.step()
            return self.base_optimizer.step(lambda: self._evaluate(closure))
        finally:
            # What was collected for these weights must not meet the next ones. Not
            # before: the closure may be the last micro-batch, as in Lightning.
            self._progress.forget()

    def _evaluate(self, closure: Closure) -> Any:
        """Call a closure; harmonize the losses if it returns them."""
        with torch.enable_grad():  # as bases do, but for those that leave it to us
            result = closure()
        if isinstance(result, Tensor) and result.dim() != 1:
            return result
        if not isinstance(result, Tensor | Mapping | list | tuple):
            return result
        losses = named_losses(result)
        self.zero_grad()
        self.backward(losses)
        return torch.stack(
            [loss.detach().reshape(()) for loss in losses.values()]
        ).sum()

    def _parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """List the parameters to serve: the shared ones, and the rest."""
        progress = self._progress
        # A parameter frozen since the last micro-batch keeps what was collected for it.
        started = {p for task in progress.collected.values() for p in task}
        started.update(progress.summed)
        # Dictionaries, since one parameter may stand in a group twice.
        shared: dict[Tensor, None] = {}
        rest: dict[Tensor, None] = {}
        for place, parameter in self._placed():
            if parameter.requires_grad or parameter in started:
                is_shared = self._shared is None or place in self._shared
                (shared if is_shared else rest)[parameter] = None
        return list(shared), list(rest)

    def _reusable(self, losses: Mapping[str, Tensor]) -> Harmonization | None:
        """Give the last measurement, if it serves these losses once more."""
        progress, last = self._progress, self._progress.last
        young = 0 < progress.age < self.measure_every
        return last if young and last and {*last.names} == losses.keys() else None

    def _check_replicas(self, parameters: list[Tensor], **how: bool) -> None:
        """See that the DDP models of the parameters leave averaging to us, or do it."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        progress = self._progress
        progress.calls += 1
        # A model may be wrapped later, and to search takes too long for every step.
        if progress.calls & (progress.calls - 1) == 0:
            progress.models = ddp_models(parameters)
        check_replicas(progress.models, **how)

    def _placed(self) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Yield the parameters with their places: number of the group, number in it."""
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                yield (number, index), parameter

    def _places(self, shared_params: Iterable[Tensor]) -> frozenset[tuple[int, int]]:
        """Find the places of the shared parameters."""
        if isinstance(shared_params, Tensor) or not isinstance(shared_params, Iterable):
            kind = type(shared_params)
            raise TypeError(
                f"shared_params must be an iterable of parameters, got {kind}"
            )
        wanted = list(shared_params)
        if not wanted:
            raise ValueError("shared_params must hold a parameter, got none")
        for index, parameter in enumerate(wanted):
            if not isinstance(parameter, Tensor):
                entry = f"{type(parameter)} at {index}"
                raise TypeError(f"shared_params must hold parameters, got {entry}")
        known = {parameter for _, parameter in self._placed()}
        for index, parameter in enumerate(wanted):
            if parameter not in known:
                given = f"one of shape {list(parameter.shape)} at {index} that is not"
                raise ValueError(
                    f"shared_params must be in base_optimizer, got {given}"
                )
        members = set(wanted)
        return frozenset(place for place, p in self._placed() if p in members)

    def _harmonize(
        self,
        names: list[str],
        shared: list[Tensor],
        collected: list[Collected],
        ranks: Ranks | None,
        deferral: Deferral | None,
    ) -> list[Tensor | None]:
        """Combine the gradients of the tasks, and note how."""
        gradients = [
            [task.get(parameter) for parameter in shared] for task in collected
        ]
        products = deferral.gramian() if deferral else None
        if products is None:
            products = gramian(gradients)
        elif any(collected):
            products = products + gramian(gradients).to(products.device)
        weights = weigh(self.weighting, products)
        if ranks is not None:
            weights = ranks.settle(weights)
        found = Harmonization(tuple(names), products, weights)

        def gramian_of(parameters: Iterable[Tensor]) -> Tensor:
            """See ``register_harmonize_hook``."""
            wanted = set(parameters)
            made = deferral.gramian(wanted) if deferral else torch.zeros_like(products)
            rest = gramian_over(collected, [p for p in shared if p in wanted])
            return made if rest is None else made + rest.to(made.device)

        for hook in list(self._harmonize_hooks.values()):
            hook(found, gramian_of)
        self._progress.last = found
        made = deferral.combine(weights) if deferral else {}
        summed = combine(gradients, weights, products)
        sums = zip(shared, summed, strict=True)
        return [made.get(parameter, total) for parameter, total in sums]


def _in_one(losses: Mapping[str, Tensor], last: Harmonization) -> dict[str, Tensor]:
    """Sum the losses with the weights of a measurement; a task of its own."""
    # If they were not finite, as with an overflow under loss scaling, no more than that
    # one step shall suffer.
    weights = dict(zip(last.names, last.weights.nan_to_num(1, 1, 1), strict=True))
    ordered = torch.stack([weights[name] for name in losses])
    name = f"weighted sum of {sorted(losses)}"
    return {name: weighted_sum([*losses.values()], ordered)}


def _accumulate(grad: Tensor | None, added: Tensor | None) -> Tensor | None:
    """Add to ``.grad`` as autograd does: in place, where both are dense."""
    if grad is None or added is None:
        return added if grad is None else grad
    if grad.layout is added.layout is torch.strided:
        return grad.add_(added)
    # torch adds a sparse tensor to a dense one, not the reverse.
    return added + grad if grad.is_sparse else grad + added
