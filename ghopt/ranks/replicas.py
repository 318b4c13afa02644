"""The DDP models of this process: which are meant, and which would go wrong."""

from collections.abc import Iterable, Sequence
from importlib import import_module
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ghopt.living import Living
from ghopt.losses import leaves

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SyncGroup: TypeAlias = Union[
    "ProcessGroup", DistributedDataParallel, Sequence[DistributedDataParallel], bool
]
"""Ranks to average over: a group, that of one or more DDP models, or True for the default
one."""

_CURE = (
    "run the forward pass and backward() inside `with model.no_sync():`, and pass "
    "sync_group=model to backward(), or sync_group=[one, other] for several models"
)


def models_of(sync_group: SyncGroup | None) -> list[DistributedDataParallel]:
    """List the DDP models that are given as ``sync_group``.

    Raises:
        TypeError: if it is a list that holds something else.
        ValueError: if it is an empty list.
    """
    if isinstance(sync_group, DistributedDataParallel):
        return [sync_group]
    if not isinstance(sync_group, list | tuple):
        return []
    for model in sync_group:
        if not isinstance(model, DistributedDataParallel):
            kind = type(model)
            raise TypeError(f"sync_group must hold DDP models only, got {kind} in it")
    if not sync_group:
        raise ValueError("sync_group must hold a DDP model, got an empty list")
    return list(sync_group)


def also_trained(
    models: Iterable[DistributedDataParallel], parameters: Iterable[Tensor]
) -> list[Tensor]:
    """List what else DDP models train, beside these parameters."""
    known = set(parameters)
    trained = (p for model in models for p in model.parameters() if p.requires_grad)
    return list(dict.fromkeys(p for p in trained if p not in known))


class Replicas:
    """Whether DDP models of this process would train different replicas on each rank.

    torch raises if several passes reach different parameters of a model. If they reach
    the same ones the later passes stay local, and the ranks drift apart without an error.

    The process is searched for the models, of which any may be wrapped later: the hooks by
    which DDP learns of a gradient cannot be seen from the parameter.
    """

    def __init__(self) -> None:
        self._models = Living(DistributedDataParallel)

    def check(
        self,
        parameters: Iterable[Tensor],
        losses: Iterable[Tensor],
        sync_group: SyncGroup | None,
        *,
        several: bool,
        accumulate_only: bool,
    ) -> bool:
        """Refuse losses whose gradients would not all be averaged, once each.

        Args:
            parameters: those of the optimizer.
            losses: each will have a backward pass of its own.
            sync_group: as for ``backward``.
            several: whether several passes run, or a ``sync_group`` is given, which
                averages even a single one.
            accumulate_only: nothing is averaged in this call.

        Returns:
            Whether the gradients are those of this rank alone, and nobody has said that
            they shall stay so.

        Raises:
            RuntimeError: if a model will average only its first pass and there are
                more, or if it last ran inside ``no_sync()`` and this call does not
                average it.
            ValueError: if the parameters of a model are shards.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return False
        known, given = set(parameters), models_of(sync_group)
        reached: list[set[Tensor]] | None = None
        is_local = False
        # Those of the optimizer first: what they lack is the first thing to be told.
        models = [(known.isdisjoint(m.parameters()), m) for m in self._find()]
        for is_other, model in sorted(models, key=itemgetter(0)):
            is_ours = not is_other
            if is_ours:
                _refuse_shards(model)
            others = set() if model in given else {*also_trained([model], known)}
            if others and reached is None:
                reached = [{*leaves(loss)} for loss in losses if loss.requires_grad]
            passes = sum(not others.isdisjoint(found) for found in reached or [])
            if model.require_forward_param_sync:
                _refuse_later_passes(model, is_ours and several, passes)
            elif model.process_group.size() > 1 and sync_group is not False:
                if not accumulate_only:
                    _refuse_local(model, is_ours and sync_group is None, passes)
                is_local |= sync_group is None and (is_ours or passes > 0)
        return is_local

    def armed(self, parameters: Iterable[Tensor]) -> list[DistributedDataParallel]:
        """List the models of some parameters that average the next backward pass."""
        if not (dist.is_available() and dist.is_initialized()):
            return []
        known = set(parameters)
        return [
            model
            for model in self._find()
            if model.require_forward_param_sync
            and not known.isdisjoint(model.parameters())
        ]

    def _find(self) -> list[DistributedDataParallel]:
        """List the models that have run, but for one in the middle of its forward pass.

        Lightning calls training_step, and that backward, there, and prepares each
        backward pass by itself.
        """
        active = DistributedDataParallel._active_ddp_module
        # Until it has run a model claims to be armed (require_forward_param_sync).
        return [m for m in self._models() if m is not active and m._lazy_init_ran]


def _refuse_later_passes(
    model: DistributedDataParallel, is_ours: bool, passes: int
) -> None:
    """Refuse passes through a model that averages the first one only.

    Args:
        model: its last forward pass prepared for one pass.
        is_ours: whether several go through its parameters that are in the optimizer.
        passes: how many go through the others.
    """
    if is_ours:
        raise RuntimeError(
            "losses need one backward pass each, but the DDP model of these parameters "
            f"averages the first one only: {_CURE}"
        )
    if passes > 1:
        raise RuntimeError(
            f"losses reach {_name(model)}, a DDP model beside this optimizer, in {passes} "
            f"backward passes, of which it averages the first one only: {_CURE}. Or freeze "
            "the model, if its gradients are not wanted"
        )


def _refuse_local(model: DistributedDataParallel, is_ours: bool, passes: int) -> None:
    """Refuse passes through a model that last ran inside no_sync() and nobody averages.

    Args:
        model: prepared for no pass.
        is_ours: whether its parameters are in the optimizer, and will not be averaged.
        passes: how many go through others of its parameters that will not be.
    """
    if is_ours:
        raise RuntimeError(
            "losses would give other gradients on every rank, since the DDP model of these "
            "parameters last ran inside no_sync(): pass sync_group=model to backward(), or "
            "sync_group=False if you average them yourself"
        )
    if passes:
        raise RuntimeError(
            f"losses reach parameters of {_name(model)}, a DDP model that last ran inside "
            "no_sync(), which are not in this optimizer: nobody would average them. Pass "
            "sync_group=[...] to backward() with every model that the losses reach, or "
            "sync_group=False if you average them yourself"
        )


def _name(model: DistributedDataParallel) -> str:
    return type(model.module).__name__


def _refuse_shards(model: DistributedDataParallel) -> None:
    mesh = getattr(model, "device_mesh", None)
    if mesh is not None and _root_of(mesh) != mesh:
        raise ValueError(
            "parameters must not be shards that DDP has made plain tensors of: "
            "leave DDP out and pass the data-parallel group as sync_group"
        )


def _root_of(mesh: Any) -> Any:
    """Find the mesh that one was cut out of, or itself, as DDP does."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    # As before torch 2.10.
    meshes = import_module("torch.distributed.device_mesh")
    return meshes._mesh_resources.get_root_mesh(mesh)
