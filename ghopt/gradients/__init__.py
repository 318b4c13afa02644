"""What K backward passes leave, whichever way they ran: :class:`TaskGradients`."""

from ghopt.gradients.tasks import StoredGradients, TaskGradients

__all__ = ["StoredGradients", "TaskGradients"]
