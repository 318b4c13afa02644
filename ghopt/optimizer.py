"""Any torch optimizer, stepping on harmonized gradients: ``HarmonizedOptimizer``.

All that changes between calls lives in one object that is changed in place. Lightning and
Fabric run these methods on a proxy with our attributes, where an attribute set anew would
stay. No list of parameters outlives a call: Accelerate swaps parameters inside the groups.
"""

import sys
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from ghopt.change import ChangeHook, copied, look, project_momentum, project_step
from ghopt.closures import Closure, are_losses, has_new, is_single, versions
from ghopt.features import Features
from ghopt.geometry import Weighting, gh
from ghopt.gradients import StoredGradients
from ghopt.gradients.graph import HOOKS
from ghopt.harmonize import (
    LATE,
    Options,
    Passes,
    check_passes,
    finish,
    numbers_of,
    run,
)
from ghopt.losses import Losses, named_losses, protected_names
from ghopt.measuring import Harmonization, HarmonizeHook, check_weighting
from ghopt.passes import BackwardFn, Roles
from ghopt.places import placed, places
from ghopt.progress import Progress
from ghopt.ranks import SyncGroup, mean_over_ranks, world_size
from ghopt.stepping import (
    has_unscaled,
    is_unscaled,
    is_zero,
    passing_by,
    scaler_that_asks,
    takes,
)
from ghopt.wrapper import Wrapper


class HarmonizedOptimizer(Wrapper):
    """Wrap an optimizer so that it steps on harmonized task gradients.

    In place of the sum of the task gradients ``g_k`` it steps on ``sum_k w_k g_k``, with
    ``w = weighting(G)`` and ``G[i, j] = g_i . g_j``. ``gh``, the default, gives the nearest
    gradients that oppose no task; without a conflict all weights are 1.

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = HarmonizedOptimizer(torch.optim.AdamW(model.parameters()))
    >>> out = model(torch.ones(4, 2))
    >>> optimizer.zero_grad()
    >>> optimizer.backward([out.square().mean(), (out - 1).abs().mean()])
    >>> optimizer.step()

    Not for losses that are opposed by design, as a loss and its penalty, or the
    reconstruction and the KL term of a VAE: make them one task, ``{"elbo": [a, b]}``.

    Everything else is the base optimizer's: groups, state, schedulers, checkpoints. Use
    this object, not the base, for ``GradScaler.unscale_`` and ``GradScaler.step``.

    Args:
        base_optimizer: takes the step; any :class:`torch.optim.Optimizer`.
        weighting: from the Gramian of the task gradients, ``[K, K]`` in float64, to
            their weights, ``[K]``. ``ghopt.gh``, the default, never opposes a task.
        shared_params: those over which the Gramian is taken and which receive the
            weighted sum; the other parameters of the optimizer receive the plain sum.
            By default all parameters of the optimizer are shared. Positions in the groups
            are stored, not tensors: a parameter put in the place of another is found.
        measure_every: measure the conflict in every so many steps, and in between run a
            single pass of the losses summed with the last weights: the paper's equivalent
            model (eq. 44 and 45). 1, the default, is exact. With more the weights are
            those of earlier parameters and data, *all* parameters that the losses reach
            receive the weighted sum, also those outside this optimizer, and the update
            may oppose a task. Other tasks than before are measured anew; so are the
            first ones after a checkpoint is loaded, which does not hold the weights.
            Weights that were not finite serve as 1.
        passes: ``"auto"`` looks at the graph of the losses before the first pass of a
            step, on the CPU, and takes what is faster and gives the same to rounding.
            Linear layers with so few rows (batch x positions) that it is less work and
            memory get their weight gradients once for all tasks. In small networks five
            tasks or more share one pass through what they have in common. All else takes
            a pass for each task, as everything does with ``"separate"``: with hooks on what
            would be shared, functions of your own, checkpoints, compiled parts,
            ``backward_fn``, ``accumulate_only``, ``project_step``, autocast, a process
            group, or torch 2.8. (A hook registered anywhere since the last step may have
            that effect for one step.) Not seen is ``retain_grad()`` of a weight that you
            transposed by hand, which stays without ``.grad``, and, in a small network, of
            an activation that nothing saved as its input (before a ReLU, say): its
            ``.grad`` is of no use then. Nor are hooks in C++.
        project_step: change what the base optimizer does as little as it takes so that no
            task is set back, to first order. ``gh`` promises this of the *gradient*;
            momentum and Adam's scales make a step of it that opposes tasks all the same.
            With any base and any weighting. Before the step the momentum is projected
            (``exp_avg`` or ``momentum_buffer`` in ``state``, taken for an average of
            gradients; see ``ghopt.change``); after it, the change of the parameters,
            decoupled weight decay included (to leave that out changed nothing that shows,
            in three trainings with AdamW and a decay of 0.1 and of 1). What is left opposes no task by more than
            1e-6 of the lengths (3.6e-5 where gradients are nearly dependent, see
            ``gh_coefficients``), beside the rounding of the parameters to their dtype.

            Not for L-BFGS with many iterations in a step: to first order says nothing of
            a step so long, and two trainings on Burgers' equation were ruined by it.

            Projected are the shared parameters that a task reaches, all alike, whatever
            their rates; those that are frozen, or in a group with the rate 0, and all
            others move as the base moves them. Nothing changes, to the bit, where neither
            momentum nor step opposes a task, or where a gradient is not finite.

            The gradients are those that ``backward`` found, as they were before clipping
            and whatever else is done to ``.grad``. Those of several calls add up by task.
            With a closure they are those of its first evaluation. They serve one step: a
            second one on the same ``.grad`` is the base's own. ``zero_grad`` of this
            optimizer drops them; another ``zero_grad`` only if it sets ``.grad`` to None.
            (Else an overflow, for which a scaler skips a step, leaves the next step as
            the base makes it.)

            Costs K + 1 copies of the gradients, kept until the step, and two Gramians'
            last rows. Passes are separate. Replicas must have processors alike: each
            projects by itself.
        protect: names of tasks, or numbers in a list of losses, that the others must not
            harm: "one main task and auxiliary losses". With ``gh`` the gradients are
            projected on the cone of these tasks alone (``ghopt.gh_coefficients``); with
            ``project_step`` so are momentum and step. A task that has no part in a call
            protects nothing there, but each must have had one by the first step.

    Attributes:
        base_optimizer: as given.
        weighting: as given.
        measure_every: as given.
        passes: as given.
        project_step: as given.
        protect: names as given, numbers as the names that they stand for; or None.

    Raises:
        TypeError: if ``base_optimizer`` is no optimizer or harmonized already,
            ``weighting`` not callable, a class or an aggregator of TorchJD, ``shared_params`` no
            iterable of parameters, ``measure_every`` no whole number, ``protect`` a bare
            string, no iterable or one of other things.
        ValueError: if ``shared_params`` is empty or holds one that is not in
            ``base_optimizer``, or ``measure_every`` is less than 1, or more with
            ``shared_params``, since one pass cannot give both sums, or more with
            ``project_step``, since one pass gives no gradients of tasks; if ``protect``
            is empty, or has neither ``gh`` nor ``project_step`` to do it; if ``passes``
            is something else.
    """

    passes: Passes = "auto"  # of a pickle that is older than it
    project_step: bool = False  # likewise
    protect: tuple[str, ...] | None = None  # likewise
    _arguments = (
        "base_optimizer",
        "weighting",
        "measure_every",
        "passes",
        "project_step",
        "protect",
    )

    def __init__(
        self,
        base_optimizer: Optimizer,
        weighting: Weighting = gh,
        *,
        shared_params: Iterable[Tensor] | None = None,
        measure_every: int = 1,
        passes: Passes = "auto",
        project_step: bool = False,
        protect: Iterable[str | int] | None = None,
    ) -> None:
        if not isinstance(base_optimizer, Optimizer):
            given = type(base_optimizer)
            raise TypeError(f"base_optimizer must be a torch Optimizer, got {given}")
        if isinstance(base_optimizer, HarmonizedOptimizer):
            raise TypeError(
                "base_optimizer must not be harmonized already, got a HarmonizedOptimizer: "
                "wrap the optimizer inside it, .base_optimizer"
            )
        check_weighting(weighting)
        if not isinstance(measure_every, int):
            raise TypeError(f"measure_every must be an int, got {measure_every!r}")
        if measure_every < 1:
            raise ValueError(f"measure_every must be at least 1, got {measure_every}")
        if measure_every > 1 and shared_params is not None:
            given = f"got {measure_every}"
            raise ValueError(f"measure_every must be 1 with shared_params, {given}")
        if measure_every > 1 and project_step:
            given = f"got {measure_every}"
            raise ValueError(f"measure_every must be 1 with project_step, {given}")
        check_passes(passes)
        self.protect = None if protect is None else protected_names(protect)
        if protect is not None and weighting is not gh and not project_step:
            raise ValueError(
                f"protect must come with weighting=gh or project_step=True, got {weighting!r}"
            )
        self.base_optimizer = base_optimizer
        self.weighting = weighting
        self.measure_every = measure_every
        self.passes = passes
        self.project_step = project_step
        self._shared = (
            None if shared_params is None else places(shared_params, base_optimizer)
        )
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
        features: Features | None = None,
    ) -> None:
        """Run one backward pass per task and add the harmonized gradient to ``.grad``.

        In place of ``sum(losses).backward()``, and like it: gradients add to what is in
        ``.grad``, a parameter that no task reaches keeps its ``.grad`` (None, if so),
        parameters outside this optimizer receive the plain sum. The last pass frees the
        graph that it runs through; what only earlier losses use lives as long as they.

        An exception leaves the ``.grad`` of this optimizer's parameters as it was and
        drops what was collected. (Parameters outside keep the passes that finished, as
        after any failing ``backward``.)

        Where all (shared) parameters are frozen there is nothing to measure: one pass of
        the plain sum runs, and ``last`` stays as it is.

        Args:
            losses: one per task: a mapping from names, a list or other iterable, or a
                1-D tensor. A loss is a real scalar, with weights of your own already in
                it, or a list of scalars that are one task together, ``{"cls": [l1, l2],
                "box": l3}``: their sum, in one pass. Not ``torch.stack(losses)``, if you
                have the losses: each pass would run through the graphs of all.
            total: a scalar made of the losses, by a framework that scales or divides
                it: each loss counts with the factor with which it enters the total.
                Nothing else that requires grad may be in it, and no loss be computed
                from another. On the CPU a task with the factor 0 costs no pass.
            retain_graph: keep the graph after the last pass.
            backward_fn: runs each pass in place of ``loss.backward``, called as
                ``backward_fn(loss, retain_graph=...)``. If it runs
                ``loss.backward(create_graph=True)``, and lets ``retain_graph`` be, the
                harmonized gradient can be differentiated; the weights are constant.
            accumulate_only: keep the gradients of the tasks apart, to be added to those
                of the next call, and leave ``.grad`` alone. For all micro-batches but
                the last: harmonizing each by itself is another algorithm. With names a
                task may be absent from a micro-batch, and adds nothing there.
                ``finish_accumulation``, or else ``step``, harmonizes what is still kept, ``zero_grad`` of this optimizer drops it;
                ``zero_grad`` of the model or of the base optimizer cannot.
            sync_group: average the gradients of each task over these ranks before they
                are harmonized: a DDP model, or a list of all DDP models that the losses
                reach, with this call *and* the forward pass inside their ``no_sync()``;
                or a process group, or True for the default one. Nothing is sent where
                ``accumulate_only``. The parameters of the models that are outside this
                optimizer are averaged, too, and parameters may stand in the groups in
                any order. DTensors whose mesh holds these ranks (FSDP2) are averaged
                already. All ranks take the weights of the first. A task, by its name,
                that some rank does not have counts as zero there. False: leave the
                gradients of each rank as they are, on purpose.
            features: what the trunk computes and the heads take: a tensor, or several of
                which none was computed from another. For those who cannot afford K
                passes: the K gradients at the features alone are measured and weighed,
                then *one* ordinary pass of the summed losses runs, in which the weighted
                sum goes on from the features in place of the gradient that arrives. All
                that is behind the features receives that, be it in this optimizer or not;
                all other parameters, heads of several tasks included, the plain sum. One
                that is reached both ways (tied embeddings) has both added. With
                ``measure_every`` the passes in between are as ever. ``last.gramian`` is
                that of the features, of all ranks.

                Another promise, and a weaker one: no task is opposed in what the
                *features* shall become. On the parameters most of the conflict remains.
                Hooks on tensors in the heads run for the K gradients, too; the heads must
                have no reentrant checkpoint. A DDP model stays armed: no ``no_sync()``,
                and no ``sync_group`` is needed; those that ran inside ``no_sync()`` need
                it, and are averaged after the pass.

        Raises:
            TypeError: if ``losses`` is not iterable, a loss or ``total`` no tensor,
                ``backward_fn`` not callable, ``sync_group`` nothing of the above, or
                the weighting returns no tensor, ``features`` no tensors.
            ValueError: if there is no loss, one is not a real scalar, none requires
                grad, the tasks have no names and are not those of the micro-batches
                before or of the other ranks, ``total`` is not made of the losses, no loss reaches a
                (shared) parameter of this optimizer, the weighting returns anything but
                K weights or one that the gradients' dtype cannot hold, there is no
                process group or it is a model that cannot be used, ranks of sharded
                parameters would run other passes; if ``features`` do not require grad,
                are leaves, lie behind one another or no loss depends on one; if they come
                with ``shared_params``, ``accumulate_only``, ``backward_fn``, with what
                looks at the step (``project_step``, hooks) or in a closure of L-BFGS.
            RuntimeError: if a pass fails, with its cure if the graph was used before; if
                a model was compiled and trained before ghopt was imported, and needs
                ``torch.compiler.reset()``; if a parameter changes
                during the passes; if another rank fails or does not come; if a DDP model
                that the losses reach would average the first pass only, or none.
        """
        progress = self._progress
        progress.is_known = True
        progress.drop_cleared()
        options = self._options(
            total=total,
            retain_graph=retain_graph,
            backward_fn=backward_fn,
            accumulate_only=accumulate_only,
            sync_group=sync_group,
            features=features,
        )
        roles = self._roles()
        outcome = run(
            losses,
            roles,
            self.weighting,
            options,
            progress.accumulation,
            progress.replicas,
            self._reusable,
            [*self._harmonize_hooks.values()],
        )
        group = None if accumulate_only else sync_group
        progress.note(outcome, lambda value: mean_over_ranks(value, group, roles.own))

    def step(  # type: ignore[override]  # one more way to call it than the base class
        self,
        closure: Closure | None = None,
        *,
        losses: Losses | None = None,
        features: Features | None = None,
        **options: Any,
    ) -> float | None:
        """Step the base optimizer on the gradients in ``.grad``.

        Micro-batches that were only accumulated (``accumulate_only``) are harmonized
        first: a framework may decide late that a step follows.

        Args:
            closure: handed to the base optimizer, for bases that evaluate more than
                once. It calls ``backward`` of this optimizer, or it returns the losses,
                in any form that ``backward`` takes: then ``zero_grad()`` and
                ``backward(losses)`` follow. The weights are measured once, by a
                ``backward`` since the last step or else at the first evaluation, and held
                to the end of the step, so that the base minimises one function: it is
                given the weighted sum of the losses, whose gradient is the harmonized
                one. Terms that the closure differentiates by itself are not in it: make
                them a loss. The value of a closure that does neither is handed on as it is.
            losses: as for ``backward``: a shorthand for ``zero_grad()``,
                ``backward(losses)``, ``step()``. With several ranks, as with a closure
                that returns losses, call them one by one, for ``sync_group``.
            features: as for ``backward``, of these losses.
            options: whatever else the step of the base optimizer takes, by keyword.

        Returns:
            What the base optimizer returns.

        Raises:
            TypeError: if ``closure`` is not callable, or the base optimizer does not take
                an option.
            ValueError: if ``protect`` names what was no task of any call up to the first
                step, or a group is maximised with ``project_step`` or a hook that looks at
                the step. If both ``closure`` and ``losses`` are given, or a closure to
                L-BFGS with ``shared_params``: no function has the weighted sum as its
                gradient in some parameters, and the plain sum in the others. If
                ``features`` are given without ``losses``.
            RuntimeError: if a closure harmonizes twice with ``shared_params`` or
                ``features``, for the same reason; the base has begun to step then. If micro-batches were only
                accumulated, and a GradScaler has unscaled the gradients already or ranks
                would have to average them.
        """
        for name in options:
            if not takes(self.base_optimizer.step, name):
                raise TypeError(f"step() got an unexpected keyword argument {name!r}")
        if features is not None and losses is None:
            raise ValueError(
                "features must come with losses here: else with backward()"
            )
        if closure is None and losses is None:
            self._finish()
        args = () if closure is None else (closure,)
        if losses is not None:
            given = {} if features is None else {"features": features}
            options = {"losses": losses, **given, **options}
        return self._step(*args, **options)

    # torch hooks the step of every optimizer class; here _step has its hooks.
    step.hooked = True  # type: ignore[attr-defined]

    def finish_accumulation(self, *, sync_group: SyncGroup | None = None) -> None:
        """Harmonize micro-batches that were only accumulated, into ``.grad``, now.

        For frameworks that know late which micro-batch was the last. ``step`` does it,
        too, but what comes between, clipping and ``unscale_``, needs ``.grad`` before.
        Does nothing where nothing is pending.

        Args:
            sync_group: as for ``backward``: average the gradients of each task over these
                ranks first. All ranks must call it alike.

        Raises:
            ValueError: if the ranks differ in their parameters, or in tasks without names.
            RuntimeError: if ranks would have to average the gradients and ``sync_group``
                is None, or a GradScaler has unscaled the gradients of this step already;
                nothing is lost then. If a rank fails or does not come.
        """
        self._finish(sync_group=sync_group)

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
        HOOKS.note()  # it is none of a graph
        return handle

    def register_change_hook(self, hook: ChangeHook) -> RemovableHandle:
        """Have a hook called after each step, with what the step did to the tasks.

        It is called as ``hook(change)``, with a :class:`ghopt.Change`: inner products of
        the change of the harmonized parameters and the task gradients. For that the
        gradients are kept until the step: K + 1 copies. Not called after a step before
        which nothing was measured. As in torch, hooks are not copied and not pickled.

        Returns:
            A handle whose ``remove()`` takes the hook away.
        """
        handle = RemovableHandle(self._change_hooks)
        self._change_hooks[handle.id] = hook
        HOOKS.note()
        return handle

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` as the base optimizer does, and any started accumulation."""
        progress, clear = self._progress, self.base_optimizer.zero_grad
        progress.clear()
        if progress.clears_to is None:
            progress.clears_to = takes(clear, "set_to_none")
        if progress.clears_to:
            clear(set_to_none=set_to_none)
        else:
            clear()

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
        self._progress.gradients = None
        self._progress.steps = 0
        self._progress.is_measured = False
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @property
    def last(self) -> Harmonization | None:
        """What the last ``backward`` that harmonized found and did; None before it."""
        return self._progress.last

    def __getattr__(self, name: str) -> Any:
        """Forward unknown public names to the base optimizer."""
        if name == "_step_supports_amp_scaling":
            scaler = scaler_that_asks(sys._getframe(1))
            if scaler is not None:
                # The last chance before it unscales: a framework may decide late.
                self._finish(scaler)
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        """Give what a copy needs: as in torch, hooks stay behind."""
        return {name: getattr(self, name) for name in (*self._arguments, "_shared")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`__getstate__` gave."""
        self.__dict__.update(state)
        self._set_up()

    def __repr__(self) -> str:
        """Show the weighting and the base optimizer."""
        weighting = getattr(self.weighting, "__name__", repr(self.weighting))
        return f"{type(self).__name__}(weighting={weighting}, {self.base_optimizer!r})"

    def _set_up(self) -> None:
        """Start with no progress and no hooks; torch expects six dictionaries of hooks."""
        HOOKS.note()
        self._progress = Progress()
        self._harmonize_hooks: OrderedDict[int, HarmonizeHook] = OrderedDict()
        self._change_hooks: OrderedDict[int, ChangeHook] = OrderedDict()
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()

    @Optimizer.profile_hook_step
    def _step(
        self,
        closure: Closure | None = None,
        *,
        losses: Losses | None = None,
        features: Features | None = None,
        **options: Any,
    ) -> float | None:
        """Step the base between the hooks, on the value of :meth:`_evaluate`."""
        base, progress = self.base_optimizer, self._progress
        if closure is not None and not callable(closure):
            given = f"{type(closure)} (losses are given by keyword)"
            raise TypeError(f"closure must be callable, got {given}")
        if closure and isinstance(base, LBFGS) and self._roles().summed:
            raise ValueError(f"closure must be None for L-BFGS here: {_NO_FUNCTION}")
        if losses is not None:
            if closure is not None:
                raise ValueError(
                    "closure must be None where losses are given, got both"
                )
            named = named_losses(losses)  # before zero_grad: an error changes nothing
            self.zero_grad()
            self.backward(named, features=features)
        progress.drop_cleared()
        before = self._parameters_before(closure)
        if closure is None:
            self._warn_of_plain_gradients()
            self._check_protect()
            self._project_momentum(before)
        args = () if closure is None else (lambda: self._evaluate(closure, before),)
        progress.is_stepping = True
        try:
            with passing_by(base):
                result = base.step(*args, **options)
            if before and progress.gradients:
                self._look_at_step(progress.gradients, before)
            return result
        finally:
            # What was collected for these weights must not meet the next ones. Not
            # before: the closure may be the last micro-batch, as in Lightning.
            progress.end_step()

    def _evaluate(self, closure: Closure, before: Collection[Tensor]) -> Any:
        """Call a closure, harmonize the losses if it returns them, and weigh them."""
        progress = self._progress
        progress.value = None
        progress.values.clear()
        progress.evaluations += 1
        old = versions(self._grads())
        with torch.enable_grad():  # as bases do, but for those that leave it to us
            result = closure()
            is_done = progress.value is not None or bool(progress.values)
            # One element, and a backward pass has been: a loss, not a list of one.
            is_loss = is_single(result) and has_new(self._grads(), old)
            if are_losses(result) and not (is_done or is_loss):
                losses = named_losses(result)
                self.zero_grad()
                self.backward(losses)
            self._finish()
        if progress.evaluations == 1:  # the base uses its momentum after this
            self._check_protect()
            self._project_momentum(before)
        if progress.value is None:
            self._warn_of_plain_gradients()
            return result
        return progress.value

    def _finish(
        self, scaler: GradScaler | None = None, sync_group: SyncGroup | None = None
    ) -> None:
        """Harmonize micro-batches that were only accumulated, into ``.grad``.

        Args:
            scaler: is about to unscale the gradients.
            sync_group: average over these ranks first.
        """
        progress = self._progress
        alone = sync_group is None or sync_group is False
        if alone and not progress.accumulation:
            return
        if scaler:
            is_late = has_unscaled(scaler, self)
        else:  # without gradients no scaler has unscaled any
            is_late = bool(self._grads()) and is_unscaled(self)
        if is_late:
            raise RuntimeError(
                "micro-batches were only accumulated, and a GradScaler has unscaled the "
                f"gradients already: {LATE}, before unscale_() and step() of the scaler"
            )
        hooks = [*self._harmonize_hooks.values()]
        roles = self._roles()
        # Micro-batches kept as one weighted sum have used the weights of an earlier step.
        is_served = progress.accumulation.is_weighed and progress.steps > 0
        options = self._options(sync_group=sync_group)
        outcome = finish(roles, self.weighting, options, progress.accumulation, hooks)
        progress.is_measured |= is_served
        progress.note(
            outcome, lambda value: mean_over_ranks(value, sync_group, roles.own)
        )

    def _options(self, **given: Any) -> Options:
        """Complete the options of a call by those of this optimizer."""
        if self.project_step and given.get("sync_group") is False and world_size() > 1:
            raise ValueError(
                "sync_group must average the gradients with project_step, got False: "
                "each rank would project on gradients of its own, and the parameters "
                "would drift apart. Pass the DDP model"
            )
        if given.get("features") is not None:
            self._check_features()
        keep = self.project_step or bool(self._change_hooks)
        return Options(**given, passes=self.passes, keep=keep, protect=self.protect)

    def _check_features(self) -> None:
        """Refuse features where a part of what they stand for is asked for otherwise."""
        if self._shared is not None:
            raise ValueError(
                "features must be None with shared_params: the parameters behind the "
                "features are those that receive the weighted sum. Leave one of both out"
            )
        if self._progress.is_stepping and isinstance(self.base_optimizer, LBFGS):
            raise ValueError(f"features must be None for L-BFGS: {_NO_FUNCTION}")

    def _parameters_before(self, closure: Closure | None) -> dict[Tensor, Tensor]:
        """Copy what a step may change, if it is to be looked at."""
        if not (self.project_step or self._change_hooks):
            return {}
        if any(group.get("maximize") for group in self.param_groups):
            raise ValueError(
                "maximize must be False with project_step, and with hooks that look at "
                "the step: a step up opposes every task. Minimise the negative losses"
            )
        moving = {
            parameter
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.requires_grad and not is_zero(group.get("lr", 1))
        }
        if closure is not None:  # its gradients are not there yet
            return copied(p for p in self._roles().harmonized if p in moving)
        kept = self._progress.gradients or ()
        return copied(p for p in kept if p in moving and p.grad is not None)

    def _look_at_step(
        self, kept: StoredGradients, before: dict[Tensor, Tensor]
    ) -> None:
        """Project what the base did, and show it to the hooks."""
        gradients = kept.over(before)
        if not gradients:
            return
        hooks = [*self._change_hooks.values()]
        if self.project_step:
            # Hooks see what the parameters did, rounding included.
            shown = {p: old.clone() for p, old in before.items()} if hooks else {}
            project_step(gradients, before, self._protected(gradients))
            before = shown
        if hooks:
            change = look(gradients, before)
            for hook in hooks:
                hook(change)

    def _check_protect(self) -> None:
        """Refuse a name in ``protect`` that is that of no task up to the first step."""
        known = self._progress.tasks
        unknown = [name for name in self.protect or () if name not in known]
        if known and unknown:
            raise ValueError(
                f"protect must name tasks, got {unknown}: backward() has seen {[*known]}"
            )

    def _project_momentum(self, before: Collection[Tensor]) -> None:
        """Project the momentum that the base is about to use."""
        kept = self._progress.gradients
        gradients = kept.over(before) if kept and self.project_step else None
        if gradients:
            protected = self._protected(gradients)
            project_momentum(gradients, self.base_optimizer, protected)

    def _protected(self, gradients: StoredGradients) -> list[int] | None:
        """Number the tasks that are protected; None: all."""
        names = self.protect
        return None if names is None else numbers_of(names, gradients.names)

    def _grads(self) -> list[Tensor]:
        parameters = (parameter for _, parameter in placed(self.param_groups))
        return [p.grad for p in parameters if p.grad is not None]

    def _warn_of_plain_gradients(self) -> None:
        """Warn once of a training that does not know of ``backward``."""
        progress = self._progress
        # Distributed checkpoints step at rate 0, to have the state made.
        if progress.is_known or not self._grads() or not self._moves():
            return
        progress.is_known = True
        warnings.warn(
            "step() found gradients, but backward() of this optimizer was never called: "
            "nothing is harmonized. Call optimizer.backward([loss_a, loss_b]) in place of "
            "(loss_a + loss_b).backward()",
            stacklevel=5,
        )

    def _moves(self) -> bool:
        """Say whether a learning rate is not zero."""
        return not all(is_zero(group.get("lr", 1)) for group in self.param_groups)

    def _roles(self) -> Roles:
        """Tell the shared parameters from the others, as far as they are trained."""
        # A parameter frozen since the last micro-batch keeps what was collected for it.
        started = self._progress.accumulation.parameters
        # Dictionaries, since one parameter may stand in a group twice.
        harmonized: dict[Tensor, None] = {}
        summed: dict[Tensor, None] = {}
        for place, parameter in placed(self.param_groups):
            if parameter.requires_grad or parameter in started:
                is_shared = self._shared is None or place in self._shared
                (harmonized if is_shared else summed)[parameter] = None
        return Roles([*harmonized], [*summed], [])

    def _reusable(self, losses: Mapping[str, Tensor]) -> Harmonization | None:
        """Give the last measurement, if it serves these losses once more.

        Raises:
            RuntimeError: if there was one for this step, with shared parameters alone.
        """
        progress, last = self._progress, self._progress.last
        is_held = progress.is_stepping and progress.is_measured
        if is_held and (self._roles().summed or (last and last.at_features)):
            raise RuntimeError(f"closure must harmonize once in a step: {_NO_FUNCTION}")
        serves = is_held or 0 < progress.steps < self.measure_every
        if not (serves and last and {*last.names} == losses.keys()):
            return None
        # What was not finite was no measurement, and its step may well have been skipped.
        return None if is_held and not last.weights.isfinite().all() else last


_NO_FUNCTION = (
    "with shared_params or features some parameters receive the weighted sum, the others "
    "the plain sum, and no function has both as its gradient. Leave them out, or give the "
    "other parameters an optimizer of their own"
)
