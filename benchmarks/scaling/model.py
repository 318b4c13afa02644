"""What one training step sends and keeps on many GPUs, plain and harmonized: formulas.

Bytes and counts; README.md derives every formula and names the source of every input. A
*plain* step sums the losses and runs one backward pass. A harmonized step of one task
runs one pass too, and sends and keeps as much.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """A transformer in the shape of Llama 2.

    Attributes:
        name: for the tables.
        parameters: their number.
        layers: number of blocks.
        width: of the residual stream.
        recompute: recompute each block's activations in the backward pass.
        tokens: that one GPU sees in a step.
    """

    name: str
    parameters: float
    layers: int
    width: int
    recompute: bool = False
    tokens: int = 4096


NETWORKS = (
    Network("1B", 1.10e9, 22, 2048),
    Network("7B", 6.74e9, 32, 4096),
    Network("13B", 13.02e9, 40, 5120),
    Network("70B", 68.98e9, 80, 8192, recompute=True),
)

# Bytes per parameter: float32 master weights, two float32 moments of AdamW, float32
# gradients, the bfloat16 copy that the products read.
MASTER, MOMENTS, GRADIENT, HALF = 4, 8, 4, 2


def passes(tasks: int, *, recompute: bool = False) -> int:
    """Count the work of a step in forward passes: 3 for the plain step (one task).

    A backward pass takes two, one for each of the two gradients of a product, and one
    more where activations are computed again.
    """
    return 1 + tasks * (3 if recompute else 2)


def reduced(world: int, size: float) -> float:
    """Bytes that a rank sends to all-reduce ``size`` bytes: there and back again."""
    return 2 * scattered(world, size)


def scattered(world: int, size: float) -> float:
    """Bytes that a rank sends to gather, or to reduce-scatter, ``size`` bytes in all."""
    return size * (world - 1) / world


def gathers(tasks: int, *, keep: bool) -> int:
    """Count how often FSDP gathers the parameters: for the forward and for each pass.

    Kept between the passes they are gathered once for all of them.
    """
    return 1 + (1 if keep else tasks)


def ddp_sent(world: int, tasks: int, gradients: float) -> float:
    """Bytes that a rank sends under DDP: one all-reduce of the gradients per task."""
    return tasks * reduced(world, gradients)


def ddp_messages(tasks: int, alone: int, packed: int) -> int:
    """Count the collectives of a harmonized step under DDP.

    Args:
        tasks: K.
        alone: tensors so large that each is a message.
        packed: messages that hold the others.
    """
    # One about the tasks, one with every task about who has which gradient, and at the
    # end one about failures and one with the weights.
    return 3 + tasks * (1 + alone + packed)


def ddp_control(world: int, tasks: int, tensors: int) -> float:
    """Bytes that a rank sends beside the gradients under DDP; 0 tasks: plain, none.

    Args:
        world: number of ranks.
        tasks: K; 0 for the plain step.
        tensors: number of parameter tensors.
    """
    # Each rank says whether it has failed, and three integers of 64 bits, then two
    # bytes for each tensor.
    header, mask = 8 * (1 + 3) * world, world + 2 * tensors
    told = header + tasks * mask + world
    return reduced(world, told) + 8 * tasks if tasks else 0.0


def fsdp_sent(
    world: int, tasks: int, parameters: float, gradients: float, *, keep: bool = False
) -> float:
    """Bytes that a rank sends under FSDP: gathers, and one reduce-scatter per task.

    Args:
        world: number of ranks.
        tasks: K; 1 for the plain step.
        parameters: size of all parameters, as they are gathered.
        gradients: size of the gradients of a task, as they are reduced.
        keep: keep the parameters gathered between the passes.
    """
    moved = gathers(tasks, keep=keep) * parameters + tasks * gradients
    return scattered(world, moved)


def fsdp_messages(tasks: int, blocks: int, *, keep: bool = False) -> int:
    """Count the collectives under FSDP; 0 tasks: plain, without the two of our own.

    These are one before the passes, in which the ranks agree on them, and the Gramian.
    """
    runs = max(tasks, 1)
    return (gathers(runs, keep=keep) + runs) * blocks + 2 * (tasks > 0)


def fsdp_memory(
    world: int,
    tasks: int,
    parameters: float,
    gradients: float,
    blocks: int,
    *,
    keep: bool = False,
    activations: float = 0.0,
) -> float:
    """Bytes at the peak under FSDP beside the shards of parameters and moments.

    The shards of the gradients of all tasks; but those of the last task grow while its
    pass frees the activations, and the parameters if they were kept. And two blocks of
    parameters, one in use and one on its way, and the gradients of one block twice: as
    the pass leaves them, in the format of the parameters, and as they are reduced.

    Args:
        world: number of ranks.
        tasks: K; 1 for the plain step.
        parameters: size of all parameters, as they are gathered.
        gradients: size of the gradients of a task, as they are reduced.
        blocks: number of equal blocks that are gathered apart.
        keep: keep the parameters gathered between the passes.
        activations: size of what the forward pass keeps.
    """
    shard = gradients / world
    freed = activations + (parameters if keep and tasks > 1 else 0)
    working = (3 * parameters + gradients) / blocks
    return (tasks - 1) * shard + max(shard, freed) + working


def fsdp_control(world: int, tasks: int) -> float:
    """Bytes that a rank sends beside parameters and gradients under FSDP; 0 tasks: none.

    Two integers of 64 bits of each rank, and the Gramian, ``[K, K]`` in float64.
    """
    return reduced(world, 2 * 8 * world + 8 * tasks**2) if tasks else 0.0


def ddp_copies(tasks: int, *, bucket_view: bool = False) -> int:
    """Count copies of the gradients under DDP, its buckets included; 0 tasks: plain.

    The buckets are there whether they are used or not. The plain step leaves the
    gradients in them if they are bucket views, and copies them there if not. The
    harmonized step has gradients of its own and leaves the buckets idle.
    """
    return tasks + 1 if tasks else 2 - bucket_view


def ddp_memory(network: Network, tasks: int) -> float:
    """Bytes at the peak under DDP with autocast; 0 tasks: the plain step."""
    gradients = GRADIENT * network.parameters
    live = HALF * network.parameters + _activations(network)
    state = (MASTER + MOMENTS) * network.parameters
    return state + (ddp_copies(tasks) - 1) * gradients + max(live, gradients)


def shard_memory(
    network: Network, world: int, tasks: int, *, keep: bool = False
) -> float:
    """Bytes at the peak under FSDP2, each block sharded over all GPUs; 0 tasks: plain.

    Parameters are gathered in bfloat16, gradients reduced in float32.
    """
    return (MASTER + MOMENTS) * network.parameters / world + fsdp_memory(
        world,
        max(tasks, 1),
        HALF * network.parameters,
        GRADIENT * network.parameters,
        network.layers,
        keep=keep,
        activations=_activations(network),
    )


def _activations(network: Network) -> float:
    """Bytes kept for the backward pass: 34 per token and unit of width in each block.

    With recomputation the 2 bytes of a block's input, and one whole block.
    """
    unit = network.tokens * network.width
    if network.recompute:
        return unit * (2 * network.layers + 34)
    return unit * 34 * network.layers
