"""What K backward passes leave, whichever way they ran: :class:`TaskGradients`."""

from ghopt.gradients.tasks import JoinedGradients, StoredGradients, TaskGradients

__all__ = ["JoinedGradients", "StoredGradients", "TaskGradients"]
