"""Objects of this process that nothing here was told of."""

import gc
import weakref
from itertools import compress
from typing import Generic, TypeVar

_T = TypeVar("_T")


def living(kind: type[_T]) -> list[_T]:
    """Search the process for the objects of a class.

    Takes as long as Python's garbage collection, some ten milliseconds. Objects that
    ``gc.freeze`` has hidden are not found.
    """
    objects = gc.get_objects()
    # Of the type: an object may lie about its class, or warn when asked for it. Each type
    # is asked once, which takes long of one with an abstract base, as DDP models have;
    # by its id, as not all types can be hashed.
    types = list(map(type, objects))
    numbers = list(map(id, types))
    of_kind = {
        number
        for number, each in dict(zip(numbers, types, strict=True)).items()
        if issubclass(each, kind)
    }
    return list(compress(objects, map(of_kind.__contains__, numbers)))


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
