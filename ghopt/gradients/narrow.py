"""Inner products on devices that have no float64, as Apple's MPS and some XPUs.

Float32 products are summed over short blocks in float32 on the device, and the sums of
the blocks in float64 on the host, which then has the Gramian. Whatever needs more digits
is done on the host: see ``products.py`` and ``sums.py``.
"""

from collections.abc import Iterable
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from ghopt.gradients.entries import DEVICE_BLOCK, Entries, blocks

# So many products are summed in float32: the more, the less exact; the fewer, the more
# sums the host reads, 20K of 1e7 elements.
_SHORT = 512


@torch.no_grad()
def quick_products(
    parameters: Iterable[Entries], tasks: int, *, last: bool = False
) -> Tensor:
    """Inner products of float32 gradients and shorter, off by less than 1e-7 of the norms.

    The host waits for the device once.

    Args:
        parameters: flat gradients of each, real.
        tasks: number of tasks, K.
        last: only those with the last task.

    Returns:
        Shape ``[K, K]``, float64, on the CPU; of the lower triangle nothing.
    """
    sums: dict[tuple[int, int], list[Tensor]] = {}
    for entries in parameters:
        for block in blocks(entries, DEVICE_BLOCK):
            parts = {task: part.float() for task, part in block.items()}
            for i, j in combinations_with_replacement(sorted(parts), 2):
                if not last or j == tasks - 1:
                    sums.setdefault((i, j), []).extend(_sums(parts[i] * parts[j]))
    total = torch.zeros(tasks, tasks, dtype=torch.float64, device="cpu")
    # In two steps, since one may be wide before it is on the host.
    host = torch.cat([part for group in sums.values() for part in group]).cpu().double()
    lengths = [sum(map(len, group)) for group in sums.values()]
    for (i, j), mine in zip(sums, torch.split(host, lengths), strict=True):
        total[i, j] = mine.sum()
    return total


def _sums(products: Tensor) -> list[Tensor]:
    """Sum over short blocks; the last one is shorter."""
    whole = len(products) // _SHORT * _SHORT
    return [
        products[:whole].view(-1, _SHORT).sum(1),
        products[whole:].sum().reshape(1),
    ]
