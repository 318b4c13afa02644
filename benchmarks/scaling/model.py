"""Cost of one training step on many GPUs, plain and harmonized: the formulas.

Seconds, bytes and counts; README.md derives every formula and names the source of every
input. A *plain* step sums the losses and runs one backward pass. A harmonized step of
one task runs one pass too and moves and keeps as much, but it hides less of its
communication under DDP, and it computes the Gramian.
"""

from dataclasses import dataclass
from math import ceil, log2


@dataclass(frozen=True)
class Hardware:
    """One GPU of a cluster and its links; by default of DGX H100 nodes.

    Attributes:
        flops: peak of dense bfloat16 products.
        utilisation: share of the peak that the passes reach while nothing waits.
        memory: capacity.
        memory_bandwidth: peak.
        node: GPUs in a node.
        link: peak bandwidth of a GPU within its node, each way.
        network: peak bandwidth of a GPU between nodes, each way.
        efficiency: share of the three bandwidths that is reached.
        ring: latency of a ring: at its start, of a step within a node, between nodes.
        tree: the same of a tree.
        fused: Gramian and combination run in kernels that read each gradient once.
    """

    flops: float = 989.4e12
    utilisation: float = 0.5
    memory: float = 80e9
    memory_bandwidth: float = 3.35e12
    node: int = 8
    link: float = 450e9
    network: float = 50e9
    efficiency: float = 0.8
    ring: tuple[float, float, float] = (10e-6, 1.9e-6, 4.0e-6)
    tree: tuple[float, float, float] = (4.4e-6, 1.2e-6, 8.5e-6)
    fused: bool = False


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


@dataclass(frozen=True)
class Cost:
    """What one step takes on one GPU.

    Attributes:
        memory: at its peak.
        sent: bytes that the GPU sends, and receives.
        compute: seconds of the passes, the combination and the optimizer.
        exposed: seconds of communication during which nothing is computed.
    """

    memory: float
    sent: float
    compute: float
    exposed: float

    @property
    def time(self) -> float:
        """Seconds of the step."""
        return self.compute + self.exposed


NETWORKS = (
    Network("1B", 1.10e9, 22, 2048),
    Network("7B", 6.74e9, 32, 4096),
    Network("13B", 13.02e9, 40, 5120),
    Network("70B", 68.98e9, 80, 8192, recompute=True),
)

# Bytes per parameter: float32 master weights, two float32 moments of AdamW, float32
# gradients, the bfloat16 copy that the products read.
MASTER, MOMENTS, GRADIENT, HALF = 4, 8, 4, 2
# Bytes that fused AdamW moves per parameter: weight and moments in and out, gradient in.
ADAMW = 28
BUCKET = 25 * 2**20  # DDP's default


def passes(tasks: int, *, recompute: bool = False) -> int:
    """Count the work of a step in forward passes: 3 for the plain step (one task).

    A backward pass takes two, one for each of the two gradients of a product, and one
    more where activations are computed again.
    """
    return 1 + tasks * (3 if recompute else 2)


def harmonizing(tasks: int, *, fused: bool = False) -> int:
    """Count the bytes that Gramian and combination move per float32 parameter.

    With the operations of torch a gradient is copied to float64 for the Gramian (4 bytes
    read, 8 written) and multiplied (8 read), then scaled (8) and, but for the first,
    added (12). Fused kernels would read every gradient twice and write one.
    """
    return 4 * (2 * tasks + 1) if fused else 20 * tasks + 8 * tasks + 12 * (tasks - 1)


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
    """Count the collectives under FSDP; 0 tasks: plain, without that of the Gramian."""
    runs = max(tasks, 1)
    return (gathers(runs, keep=keep) + runs) * blocks + (tasks > 0)


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


def gramian_sent(world: int, tasks: int) -> float:
    """Bytes that a rank sends to sum the Gramian of shards, ``[K, K]`` in float64."""
    return reduced(world, 8 * tasks**2)


def ddp_copies(tasks: int, *, bucket_view: bool = False) -> int:
    """Count copies of the gradients under DDP, its buckets included; 0 tasks: plain.

    The buckets are there whether they are used or not. The plain step leaves the
    gradients in them if they are bucket views, and copies them there if not. The
    harmonized step has gradients of its own and leaves the buckets idle.
    """
    return tasks + 1 if tasks else 2 - bucket_view


def bandwidth(hardware: Hardware, world: int) -> float:
    """Bus bandwidth: bytes a rank sends per second in a large collective.

    Between nodes all GPUs of a node send through the network at once, on rings that
    enter and leave the node at different ones, but through one link inside.
    """
    between = hardware.node * hardware.network
    peak = hardware.link if world <= hardware.node else min(hardware.link, between)
    return hardware.efficiency * peak


def ring_latency(hardware: Hardware, world: int) -> float:
    """Latency of one all-gather or reduce-scatter: once around the ring."""
    start, inside, between = hardware.ring
    hops = ceil(world / hardware.node) - 1
    return start + (world - 1 - hops) * inside + hops * between


def reduce_latency(hardware: Hardware, world: int) -> float:
    """Latency of one all-reduce: twice around the ring, or up and down a tree."""
    start, inside, between = hardware.tree
    nodes = ceil(world / hardware.node)
    steps = min(world, hardware.node) - 1
    tree = start + 2 * (steps * inside + log2(nodes) * between)
    return min(tree, 2 * ring_latency(hardware, world) - hardware.ring[0])


def ddp_exposed(tasks: int, backward: float, reduction: float) -> float:
    """Seconds that nothing is computed under DDP while task gradients are reduced.

    The all-reduce of a task starts when its pass has ended and the one before it too:
    the last is exposed, and of each other what is longer than a pass.

    Args:
        tasks: K.
        backward: seconds of one backward pass.
        reduction: seconds of the all-reduce of one task.
    """
    return reduction + (tasks - 1) * max(0.0, reduction - backward)


def ddp(hardware: Hardware, network: Network, world: int, tasks: int) -> Cost:
    """Cost under DDP with autocast; ``tasks`` = 0 is the plain step."""
    gradients = GRADIENT * network.parameters
    runs = max(tasks, 1)
    forward = _forward_time(hardware, network)
    backward = forward * (passes(1, recompute=network.recompute) - 1)
    latency = reduce_latency(hardware, world)
    speed = bandwidth(hardware, world)
    reduction = reduced(world, gradients) / speed
    if tasks:
        # Large tensors go by themselves: seven in a block, the two embeddings, and a
        # bucket of all norms. A header goes once, a mask with every task.
        alone = 7 * network.layers + 2
        reduction += (alone + 1) * latency
        exposed = ddp_exposed(tasks, backward, reduction) + (1 + tasks) * latency
    else:
        # DDP reduces during the pass; only the last bucket cannot begin before its end.
        reduction += ceil(gradients / BUCKET) * latency
        bucket = reduced(world, BUCKET) / speed + latency
        exposed = max(bucket, reduction - backward)
    live = HALF * network.parameters + _activations(network)
    return Cost(
        memory=(MASTER + MOMENTS) * network.parameters
        + (ddp_copies(tasks) - 1) * gradients
        + max(live, gradients),
        sent=ddp_sent(world, runs, gradients),
        compute=_compute_time(hardware, network, tasks, network.parameters),
        exposed=exposed,
    )


def fsdp(
    hardware: Hardware,
    network: Network,
    world: int,
    tasks: int,
    *,
    keep: bool = False,
) -> Cost:
    """Cost under FSDP2, each block sharded over all GPUs; ``tasks`` = 0 is plain.

    Parameters are gathered in bfloat16, gradients reduced in float32.
    """
    shard = network.parameters / world
    gathered = HALF * network.parameters
    gradients = GRADIENT * network.parameters
    runs = max(tasks, 1)
    forward = _forward_time(hardware, network)
    backward = forward * (passes(1, recompute=network.recompute) - 1)
    block, latency = 1 / network.layers, ring_latency(hardware, world)
    speed = bandwidth(hardware, world)
    gather = scattered(world, gathered) / speed + network.layers * latency
    scatter = scattered(world, gradients) / speed + network.layers * latency
    exposed = max(gather * block, gather - forward)
    for run in range(runs):
        before = 0.0 if keep and run else gather
        # The first gather and the last reduce-scatter have nothing to hide behind.
        exposed += max((before + scatter) * block, before + scatter - backward)
    if tasks:
        exposed += reduce_latency(hardware, world)  # of the Gramian
    return Cost(
        memory=(MASTER + MOMENTS) * shard
        + fsdp_memory(
            world,
            runs,
            gathered,
            gradients,
            network.layers,
            keep=keep,
            activations=_activations(network),
        ),
        sent=fsdp_sent(world, runs, gathered, gradients, keep=keep),
        compute=_compute_time(hardware, network, tasks, shard),
        exposed=exposed,
    )


def _forward_time(hardware: Hardware, network: Network) -> float:
    """Seconds of a forward pass: a product and a sum per parameter and token."""
    work = 2 * network.parameters * network.tokens
    return work / (hardware.flops * hardware.utilisation)


def _compute_time(
    hardware: Hardware, network: Network, tasks: int, held: float
) -> float:
    """Seconds of the passes, and of what reads the ``held`` parameters' gradients."""
    runs = passes(max(tasks, 1), recompute=network.recompute)
    moved = held * (ADAMW + (harmonizing(tasks, fused=hardware.fused) if tasks else 0))
    speed = hardware.efficiency * hardware.memory_bandwidth
    return runs * _forward_time(hardware, network) + moved / speed


def _activations(network: Network) -> float:
    """Bytes kept for the backward pass: 34 per token and unit of width in each block.

    With recomputation the 2 bytes of a block's input, and one whole block.
    """
    unit = network.tokens * network.width
    if network.recompute:
        return unit * (2 * network.layers + 34)
    return unit * 34 * network.layers
