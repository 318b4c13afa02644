"""What the ranks of a process group share, and what they agree on."""

from ghopt.ranks.agreement import (
    agree_on_passes,
    failing_together,
    has_to_average,
    mean_over_ranks,
    process_group,
    world_size,
)
from ghopt.ranks.averages import ALONE, Alone, Ranks, together
from ghopt.ranks.replicas import Replicas, SyncGroup, also_trained, models_of

__all__ = [
    "ALONE",
    "Alone",
    "Ranks",
    "Replicas",
    "SyncGroup",
    "agree_on_passes",
    "also_trained",
    "failing_together",
    "has_to_average",
    "mean_over_ranks",
    "models_of",
    "process_group",
    "together",
    "world_size",
]
