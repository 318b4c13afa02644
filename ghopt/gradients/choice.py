"""Which passes to run: one for each task, or what the graph shows to be faster."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ghopt.gradients import deferred, together
from ghopt.gradients.deferred import Deferral
from ghopt.gradients.graph import edges_of, is_special, is_supported
from ghopt.gradients.together import Together


def choose(
    losses: Mapping[str, Tensor], harmonized: Sequence[Tensor], own: Sequence[Tensor]
) -> Together | Deferral | None:
    """Find faster passes that give the same to rounding.

    The graph is walked once, and only where sizes say that it may help.

    Args:
        losses: K scalars by name, before their first pass.
        harmonized: parameters that are to be harmonized.
        own: these, and all others of the optimizer.

    Returns:
        None for separate passes.

    Raises:
        RuntimeError: as the passes would: if the graph was freed, or a tensor in it
            modified in place.
    """
    live = [loss for loss in losses.values() if loss.requires_grad]
    is_small = together.may_pay(own, len(live))
    may_defer = deferred.may_pay(harmonized, len(live))
    if not (is_small or may_defer) or not is_supported() or is_special(live):
        return None
    edges = edges_of(live)
    found = together.put_together(losses, harmonized, edges) if is_small else None
    if found is None and may_defer:
        return deferred.defer(losses, harmonized, edges)
    return found
