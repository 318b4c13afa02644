"""Gradients of tasks made one: measured, weighed and combined.

:func:`backward` is the whole of it, for loops with optimizers of their own;
:class:`ghopt.HarmonizedOptimizer` calls what it calls.
"""

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from ghopt.accumulation import Accumulation
from ghopt.features import (
    FeatureGradients,
    Features,
    gradients_at,
    listed_features,
    made,
    pass_replacing,
)
from ghopt.forms import home_of_numbers
from ghopt.geometry import Weighting, gh
from ghopt.gradients import StoredGradients, TaskGradients
from ghopt.gradients.choice import choose
from ghopt.gradients.graph import HOOKS
from ghopt.gradients.together import Together
from ghopt.losses import (
    Losses,
    as_in_total,
    scalars_of,
    summed_up,
    warn_of_many,
    weighted_sum,
)
from ghopt.measuring import (
    Harmonization,
    HarmonizeHook,
    check_weighting,
    measured,
)
from ghopt.passes import (
    BackwardFn,
    Roles,
    keeping_bucket_views,
    put_back,
    run_passes,
    runner,
    set_aside,
    trained,
    with_cure,
)
from ghopt.ranks import (
    ALONE,
    Alone,
    Ranks,
    Replicas,
    SyncGroup,
    agree_on_passes,
    also_trained,
    failing_together,
    has_to_average,
    models_of,
    process_group,
    together,
)

Reusable: TypeAlias = Callable[[Mapping[str, Tensor]], Harmonization | None]
"""Gives weights that serve these losses once more, or None."""


Passes: TypeAlias = Literal["auto", "separate"]
"""How the passes of tasks may run: see :class:`ghopt.HarmonizedOptimizer`."""


@dataclass(frozen=True)
class Options:
    """How one ``backward`` runs: see :func:`backward`, and ``HarmonizedOptimizer``.

    Attributes:
        keep: the gradients of the tasks, for :attr:`Outcome.gradients`.
        protect: names of the tasks that ``gh`` protects; None: all.
    """

    total: Tensor | None = None
    retain_graph: bool = False
    backward_fn: BackwardFn | None = None
    accumulate_only: bool = False
    sync_group: SyncGroup | None = None
    passes: Passes = "auto"
    keep: bool = False
    protect: Collection[str] | None = None
    features: Features | None = None


class Outcome(NamedTuple):
    """What one ``backward`` did.

    Attributes:
        losses: whose passes ran: of each task, or their weighted sum alone.
        found: what was measured; None where weights served once more, or gradients were
            only accumulated.
        reused: the weights that served once more.
        gradients: of the tasks, where they were measured and are to be kept.
    """

    losses: dict[str, Tensor]
    found: Harmonization | None
    reused: Harmonization | None
    gradients: StoredGradients | None = None


def backward(
    losses: Losses,
    params: Iterable[Tensor],
    weighting: Weighting = gh,
    *,
    summed_params: Iterable[Tensor] = (),
    total: Tensor | None = None,
    retain_graph: bool = False,
    backward_fn: BackwardFn | None = None,
    accumulate_only: bool = False,
    accumulation: Accumulation | None = None,
    sync_group: SyncGroup | None = None,
    passes: Passes = "auto",
    features: Features | None = None,
) -> Harmonization | None:
    """Run one backward pass per task and add the harmonized gradient to ``.grad``.

    For loops that have several optimizers, as Muon for the matrices beside AdamW, and
    for frameworks that own the step:

    >>> trunk, head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    >>> muon = torch.optim.SGD(trunk.parameters(), lr=0.1)
    >>> adam = torch.optim.AdamW(head.parameters())
    >>> out = head(trunk(torch.ones(4, 2)))
    >>> losses = [out.square().mean(), (out - 1).abs().mean()]
    >>> found = backward(losses, [*trunk.parameters(), *head.parameters()])
    >>> muon.step()
    >>> adam.step()

    Args:
        losses: as for ``HarmonizedOptimizer.backward``; so are all options but these.
        params: parameters over which the Gramian is taken, and which receive the weighted
            sum. All others receive the plain sum.
        weighting: from a Gramian, shape ``[K, K]``, to weights, shape ``[K]``.
        summed_params: others whose ``.grad`` stays as it was if a pass fails.
        total: see there.
        retain_graph: see there.
        backward_fn: see there.
        accumulate_only: keep the gradients in ``accumulation``, for the next call.
        accumulation: the same object for all micro-batches of a step.
        sync_group: see there.
        passes: as for the constructor of ``HarmonizedOptimizer``.
        features: see there; then ``params`` are those whose ``.grad`` stays as it was if
            a pass fails, and which are averaged with a ``sync_group``. Who receives which
            sum is the graph's affair.

    Returns:
        What was found and done; None where ``accumulate_only``, or where all parameters
        are frozen.

    Raises:
        TypeError: as there, or if ``params`` are no parameters.
        ValueError: as there, or if ``accumulate_only`` comes without ``accumulation``, or
            ``passes`` is something else.
        RuntimeError: as there.
    """
    if accumulate_only and accumulation is None:
        raise ValueError("accumulation must be given with accumulate_only, got None")
    check_weighting(weighting)
    check_passes(passes)
    kept = Accumulation() if accumulation is None else accumulation
    roles = Roles(trained(params), trained(summed_params), [])
    options = Options(
        total,
        retain_graph,
        backward_fn,
        accumulate_only,
        sync_group,
        passes,
        features=features,
    )
    return run(losses, roles, weighting, options, kept, Replicas()).found


def check_passes(passes: object) -> None:
    """Refuse another way to run passes.

    Raises:
        ValueError: if it is none of :data:`Passes`.
    """
    if passes not in get_args(Passes):
        raise ValueError(f'passes must be "auto" or "separate", got {passes!r}')


def run(
    losses: Losses,
    roles: Roles,
    weighting: Weighting,
    options: Options,
    accumulation: Accumulation,
    replicas: Replicas,
    reusable: Reusable | None = None,
    hooks: Collection[HarmonizeHook] = (),
) -> Outcome:
    """Do what :func:`backward` says, with state and hooks of the caller.

    Args:
        losses: of the tasks.
        roles: of the parameters of the caller; those outside are found here.
        weighting: from a Gramian to weights.
        options: of this call.
        accumulation: taken, and kept again where ``accumulate_only``.
        replicas: the DDP models of this process.
        reusable: gives weights that serve once more, in a single pass.
        hooks: called with what was found, before the gradients are combined.
    """
    if options.backward_fn is not None and not callable(options.backward_fn):
        raise TypeError(f"backward_fn must be callable, got {options.backward_fn!r}")
    if options.features is not None:
        _refuse_beside_features(roles, options, accumulation)
        features = listed_features(options.features)
        return _run_at_features(
            losses,
            features,
            roles,
            weighting,
            options,
            accumulation,
            replicas,
            reusable,
            hooks,
        )
    # Compared by identity: ``bool()`` of a compiled module raises.
    group = None if options.sync_group is False else options.sync_group
    if group is not None:
        process_group(group)
    roles = roles._replace(outside=also_trained(models_of(group), roles.own))
    with together(None if options.accumulate_only else group) as ranks:
        # With a group ``together`` tells the other ranks of an error.
        with failing_together(roles.own if ranks is ALONE else []):
            named, reused = _losses_of_passes(
                losses, roles, options, accumulation, reusable
            )
            listed = not (reused or isinstance(losses, Mapping))
            names = accumulation.joined(named, listed=listed)
            is_local = _check_replicas(named, roles, options, replicas)
        others = [*roles.summed, *roles.outside]
        names = ranks.agree(names, roles.harmonized, others, listed=listed)
        agree_on_passes(roles.own, named)
        # This empties the accumulation: if a later line raises, nothing stays in it.
        stored, summed = accumulation.take(names, roles.harmonized)
        with set_aside(roles.own) as grads:
            gradients = _collect(named, stored, summed, roles, options, ranks, grads)
            sums = {p: p.grad for p in roles.summed if p.grad is not None}
            found, added = None, {}
            if not (gradients or _is_frozen(roles)):
                raise ValueError(_NOWHERE)
            if reused:
                ranks.first_weights(reused.weights)  # the ranks' last message, in place
                (added,) = (stored[name] for name in named)
            elif not options.accumulate_only:
                found, added = weigh_and_combine(
                    gradients, names, weighting, options, ranks, hooks
                )
            if options.accumulate_only:
                put_back(roles.own, grads, {})
                accumulation.keep(stored, sums)
                accumulation.is_weighed = reused is not None
                accumulation.is_local |= is_local
                accumulation.is_listed |= listed
            else:
                put_back(roles.own, grads, {**added, **sums})
                accumulation.forget()
    HOOKS.note()
    is_kept = options.keep and found is not None
    return Outcome(named, found, reused, stored.without_graph() if is_kept else None)


def _run_at_features(
    losses: Losses,
    features: Sequence[Tensor],
    roles: Roles,
    weighting: Weighting,
    options: Options,
    accumulation: Accumulation,
    replicas: Replicas,
    reusable: Reusable | None,
    hooks: Collection[HarmonizeHook],
) -> Outcome:
    """Do what :func:`run` does, with the conflict measured and removed at features.

    In one ordinary backward pass; where weights serve once more, of the weighted losses.
    """
    armed = replicas.armed(roles.own)
    # Compared by identity: ``bool()`` of a compiled module raises.
    group = None if options.sync_group is False else options.sync_group
    if options.sync_group is None and armed:
        group = armed
    if group is not None:
        process_group(group)
    roles = roles._replace(outside=also_trained(models_of(group), roles.own))
    with together(group) as ranks:
        # With a group ``together`` tells the other ranks of an error.
        with failing_together(roles.own if ranks is ALONE else []):
            named, reused = _losses_of_passes(
                losses, roles, options, accumulation, reusable
            )
            total = summed_up({"": [x for x in named.values() if x.requires_grad]})[""]
            replicas.check(
                roles.own,
                [total],
                options.sync_group,
                several=False,
                accumulate_only=False,
            )
        listed = not (reused or isinstance(losses, Mapping))
        # What DDP averages in the pass is not averaged again.
        by_ddp = {p for model in armed for p in model.parameters()}
        apart = [p for p in [*roles.own, *roles.outside] if p not in by_ddp]
        messages = 1 if reused else 2
        names = ranks.agree([*named], [], apart, listed=listed, messages=messages)
        agree_on_passes(roles.own, named)
        with set_aside(roles.own) as grads:
            found: Harmonization | None = None
            replaced: dict[Tensor, Tensor] = {}
            if reused:
                ranks.first_weights(reused.weights)
            else:
                stored = gradients_at(features, named, names)
                gradients = FeatureGradients(stored, ranks, roles.own)
                found, replaced = weigh_and_combine(
                    gradients, names, weighting, options, ranks, hooks
                )
            retain = options.retain_graph
            with keeping_bucket_views(grads):
                pass_replacing(total, replaced, retain_graph=retain)
                averaged = [] if ranks is ALONE else apart
                sums = made(roles.own, grads, averaged)
            sums |= {p: p.grad for p in roles.outside if p.grad is not None}
            ranks.average(sums, of_all_tasks=True)()
            put_back(roles.own, grads, sums)
            for parameter in roles.outside:
                parameter.grad = sums.get(parameter)
    HOOKS.note()
    return Outcome(named, found, reused)


def _refuse_beside_features(
    roles: Roles, options: Options, accumulation: Accumulation
) -> None:
    """Refuse what needs gradients of the tasks by parameter, before anything runs."""
    reasons = {
        "with accumulate_only, or after it": options.accumulate_only or accumulation,
        "with backward_fn": options.backward_fn is not None,
        "with shared_params or summed_params": bool(roles.summed),
        "with project_step, or hooks that look at the step": options.keep,
    }
    for reason, is_given in reasons.items():
        if is_given:
            raise ValueError(
                f"features must be None {reason}: with features one ordinary pass runs, "
                "and no task has gradients of its own on the parameters"
            )


def finish(
    roles: Roles,
    weighting: Weighting,
    options: Options,
    accumulation: Accumulation,
    hooks: Collection[HarmonizeHook] = (),
) -> Outcome:
    """Harmonize what is kept of micro-batches, and add it to ``.grad``.

    Raises:
        ValueError: if ranks have other tasks without names, or other parameters.
        RuntimeError: if ranks would have to average it first, and no group is given;
            nothing is lost then. If a rank failed or does not answer.
    """
    # Compared by identity: ``bool()`` of a compiled module raises.
    group = None if options.sync_group is False else options.sync_group
    if accumulation.is_local and options.sync_group is None:
        raise RuntimeError(
            "micro-batches were only accumulated, and their gradients are those of this "
            f"rank: {LATE}, with sync_group"
        )
    roles = roles._replace(outside=also_trained(models_of(group), roles.own))
    is_weighed, listed = accumulation.is_weighed, accumulation.is_listed
    with together(group) as ranks:
        others = [*roles.summed, *roles.outside]
        kept = [*accumulation.collected]
        names = ranks.agree(kept, roles.harmonized, others, listed=listed)
        if not names:
            return Outcome({}, None, None)
        stored, summed = accumulation.take(names, roles.harmonized)
        accumulation.forget()
        outside = {p: p.grad for p in roles.outside if p.grad is not None}
        sums = {**summed, **outside}
        ends = [ranks.average(stored[name]) for name in names]
        ends += [ranks.average(sums, of_all_tasks=True)] if others else []
        for end in ends:
            end()
        if is_weighed:
            found, added = None, stored[names[0]]
            # The last message that the ranks expect.
            ranks.first_weights(_nothing_of(stored))
        else:
            found, added = weigh_and_combine(
                stored, names, weighting, options, ranks, hooks
            )
    grads = [parameter.grad for parameter in roles.own]
    put_back(roles.own, grads, {**sums, **added})
    for parameter in roles.outside:
        parameter.grad = sums.get(parameter)
    is_kept = options.keep and found is not None
    return Outcome({}, found, None, stored.without_graph() if is_kept else None)


def _nothing_of(stored: StoredGradients) -> Tensor:
    """Make a number where the weights would be, to be sent over ranks."""
    device = home_of_numbers(next(iter(stored)).device)
    return torch.zeros(1, dtype=torch.float64, device=device)


def weigh_and_combine(
    gradients: TaskGradients,
    names: Iterable[str],
    weighting: Weighting,
    options: Options,
    ranks: Alone | Ranks,
    hooks: Iterable[HarmonizeHook],
) -> tuple[Harmonization, dict[Tensor, Tensor]]:
    """Measure gradients, weigh them, and combine them in place if they are not kept."""
    if weighting is gh and options.protect is not None:
        weighting = partial(gh, protected=numbers_of(options.protect, names))
    found = measured(gradients, names, weighting, ranks)
    found = replace(found, at_features=options.features is not None)
    for hook in hooks:
        hook(found, gradients.gramian)
    return found, gradients.combine(found.weights, found.gramian, keep=options.keep)


def numbers_of(names: Collection[str], tasks: Iterable[str]) -> list[int]:
    """Number those of the tasks that have one of the names."""
    return [number for number, task in enumerate(tasks) if task in names]


LATE = (
    "give the last micro-batch to backward() without accumulate_only, or call "
    "finish_accumulation()"
)
"""The cure for a step that comes too late for what is kept."""

_NOWHERE = "losses must reach a parameter that is to be harmonized, got none"


def _losses_of_passes(
    losses: Losses,
    roles: Roles,
    options: Options,
    accumulation: Accumulation,
    reusable: Reusable | None,
) -> tuple[dict[str, Tensor], Harmonization | None]:
    """Give the losses whose passes will run, and the weights of their sum if it is one."""
    if options.total is None:
        scalars = scalars_of(losses)
        _refuse_other_owner(scalars, roles, options, accumulation)
        named = summed_up(scalars)
    else:
        named = as_in_total(losses, options.total)
    warn_of_many(named)
    if accumulation and not accumulation.is_weighed:
        return named, None
    if _is_frozen(roles):
        device = home_of_numbers(next(iter(named.values())).device)
        ones = torch.ones(len(named), dtype=torch.float64, device=device)
        reused = Harmonization(tuple(named), torch.zeros_like(ones.diag()), ones)
    else:
        found = reusable(named) if reusable else None
        if found is None:
            return named, None
        reused = found
    return _in_one(named, reused), reused


def _in_one(losses: Mapping[str, Tensor], last: Harmonization) -> dict[str, Tensor]:
    """Sum the losses with the weights of a measurement; a task of its own."""
    # Weights that are not finite (overflow under loss scaling) become 1, so that only the
    # step that made them is lost.
    weights = dict(zip(last.names, last.weights.nan_to_num(1, 1, 1), strict=True))
    ordered = torch.stack([weights[name] for name in losses])
    name = f"weighted sum of {sorted(losses)}"
    return {name: weighted_sum([*losses.values()], ordered)}


_owners: dict[int, tuple[weakref.ref[Tensor], list[weakref.ref[Any]]]] = {}
"""By the id of each living loss: it, and who ran its passes, an accumulation and a parameter.

All weakly. torch has a dictionary for that, which takes some microseconds a loss.
"""


def _refuse_other_owner(
    losses: Mapping[str, Sequence[Tensor]],
    roles: Roles,
    options: Options,
    accumulation: Accumulation,
) -> None:
    """Refuse losses that another optimizer has run its passes for.

    Its passes gave our parameters the plain sum, and ours would give it to those of the
    other. A caller who limits the passes with a ``backward_fn`` is trusted.

    Raises:
        ValueError: if there is one, as far as can be seen: scaled losses are new tensors.
    """
    if options.backward_fn is not None or not roles.harmonized:
        return
    # An optimizer keeps its accumulation, but may freeze its first parameter; calls of
    # ``backward`` have the same parameters, but each an accumulation of its own.
    mine: list[weakref.ref[Any]] = [
        weakref.ref(accumulation),
        weakref.ref(roles.harmonized[0]),
    ]
    every = [(name, loss) for name, parts in losses.items() for loss in parts]
    for name, loss in every:
        number = id(loss)
        known = _owners.get(number)
        if known is None or known[0]() is not loss:
            known = weakref.ref(loss, partial(_owners.pop, number)), mine
            _owners[number] = known
        theirs = known[1]
        living = [
            (a(), b()) for a, b in zip(mine, theirs, strict=True) if b() is not None
        ]
        if living and all(one is not other for one, other in living):
            raise ValueError(
                f"losses[{name!r}] went through the backward passes of another "
                "HarmonizedOptimizer already, and these parameters received its plain sum "
                "there. Call ghopt.backward(losses, params) once, with the parameters of "
                "all, and step their base optimizers"
            )


def _is_frozen(roles: Roles) -> bool:
    """Say whether there is nothing to harmonize."""
    return not any(parameter.requires_grad for parameter in roles.harmonized)


def _check_replicas(
    losses: Mapping[str, Tensor], roles: Roles, options: Options, replicas: Replicas
) -> bool:
    """See that no DDP model will be left out.

    Returns:
        Whether the gradients are those of this rank alone, and must be averaged.
    """
    group = None if options.sync_group is False else options.sync_group
    several = sum(loss.requires_grad for loss in losses.values()) > 1
    is_local = group is not None and has_to_average(group, roles.own)
    if group is not None or several or options.accumulate_only:
        is_local |= replicas.check(
            roles.own,
            losses.values(),
            options.sync_group,
            several=several or group is not None,
            accumulate_only=options.accumulate_only,
        )
    return is_local


def _collect(
    losses: dict[str, Tensor],
    stored: StoredGradients,
    summed: dict[Tensor, Tensor],
    roles: Roles,
    options: Options,
    ranks: Alone | Ranks,
    grads: Iterable[Tensor | None],
) -> TaskGradients:
    """Run the passes, and give what they leave."""
    for parameter in roles.summed:
        parameter.grad = summed.pop(parameter, None)
    chosen = None
    if (
        options.passes == "auto"
        and not (options.accumulate_only or options.keep or options.backward_fn)
        # Other passes give the gradients of this call and its tasks alone.
        and not stored
        and stored.names == tuple(losses)
    ):
        with with_cure():
            chosen = choose(losses, roles.harmonized, roles.own)
    if isinstance(chosen, Together):
        with with_cure():
            return chosen.run(roles.harmonized, retain_graph=options.retain_graph)
    with keeping_bucket_views(grads):
        run_passes(
            losses,
            stored,
            roles,
            run=chosen.run if chosen else runner(options.backward_fn),
            retain_graph=options.retain_graph,
            ranks=ranks,
        )
    return chosen.join(stored) if chosen else stored
