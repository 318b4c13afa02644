"""What the ranks of a process group share, and what they agree on."""

from ghopt.ranks.agreement import (
    ALONE,
    Alone,
    Ranks,
    agree_on_passes,
    averages,
    failing_together,
    mean_over_ranks,
    process_group,
    together,
)
from ghopt.ranks.replicas import Replicas, SyncGroup, also_trained, models_of

__all__ = [
    "ALONE",
    "Alone",
    "Ranks",
    "Replicas",
    "SyncGroup",
    "agree_on_passes",
    "also_trained",
    "averages",
    "failing_together",
    "mean_over_ranks",
    "models_of",
    "process_group",
    "together",
]
