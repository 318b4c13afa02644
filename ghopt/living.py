"""Objects of this process that nothing here was told of."""

import gc
import weakref
from typing import Generic, TypeVar

_T = TypeVar("_T")


def living(kind: type[_T]) -> list[_T]:
    """Search the process for the objects of a class.

    Takes as long as Python's garbage collection, some ten milliseconds. Objects that
    ``gc.freeze`` has hidden are not found.
    """
    # Of the type: an object may lie about its class, or warn when asked for it.
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]


class Living(Generic[_T]):
    """The objects of a class, searched for in calls 1, 2, 4, 8 and so on."""

    def __init__(self, kind: type[_T]) -> None:
        self._kind = kind
        self._calls = 0
        self._found: list[weakref.ref[_T]] = []

    def __call__(self) -> list[_T]:
        """List them."""
        self._calls += 1
        if self._calls & (self._calls - 1) == 0:
            self._found = [weakref.ref(found) for found in living(self._kind)]
        found = (reference() for reference in self._found)
        return [one for one in found if one is not None]
