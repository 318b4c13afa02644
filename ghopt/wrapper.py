"""A wrapper that looks like the optimizer in it: what torch asks of one.

What the contract of :class:`torch.optim.Optimizer` asks of a wrapper, and where it would
break without an error, gives it its form:

* ``param_groups``, ``state`` and ``defaults`` are properties on the base optimizer.
  Aliases would go stale at the first ``load_state_dict``, which replaces them.
* ``Optimizer.__init__`` is not called: it would make groups and state of its own.
* Nothing is kept in ``state``: AdamW takes a filled ``state[p]`` for an initialised one.
* Public names are forwarded to the base (``train`` and ``eval`` of schedule-free ones),
  private ones never: with ``_step_supports_amp_scaling`` shown, GradScaler would leave
  it to us to unscale the gradients.
"""

from collections import defaultdict
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer


class Wrapper(Optimizer):
    """An optimizer whose groups, state and public names are those of another.

    Attributes:
        base_optimizer: the other.
    """

    base_optimizer: Optimizer
    _arguments: ClassVar[tuple[str, ...]] = ("base_optimizer",)
    """Public attributes of the wrapper itself, which a copy takes along."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        self.base_optimizer.add_param_group(param_group)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the base optimizer."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of the base optimizer."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the base optimizer."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        """Forward unknown public names to the base optimizer."""
        # base_optimizer itself is unknown while unpickling.
        base = self.__dict__.get("base_optimizer")
        if base is not None and not name.startswith("_"):
            try:
                return getattr(base, name)
            except AttributeError:
                pass  # a typo is one of this object's, and so are the names to suggest
        message = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=self)

    def __setattr__(self, name: str, value: object) -> None:
        """Write public names that only the base optimizer has to the base optimizer."""
        base = self.__dict__.get("base_optimizer")
        if base is None or self._owns(name) or not hasattr(base, name):
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)

    def __delattr__(self, name: str) -> None:
        """Delete public names that only the base optimizer has from the base optimizer."""
        if self._owns(name) or name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self.base_optimizer, name)

    def _owns(self, name: str) -> bool:
        """Say whether a name is one of this object, whatever the base has."""
        is_ours = (
            name in self._arguments
            or name in self.__dict__
            or hasattr(type(self), name)
        )
        return name.startswith("_") or is_ours
