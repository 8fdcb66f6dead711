"""What was computed once and is given again: a bounded memory by exact keys."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

MAX_ENTRIES = 32  # embeddings of prompts and pictures: 4 MB each at most


class Remembered(Generic[Key, Value]):
    """The last values asked for; beyond `max_entries` the longest unused goes. For one thread at a time."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, compute: Callable[[], Value]) -> Value:
        """The value of `key`, computed if it is not known. A failed `compute` leaves nothing behind."""
        if key not in self._values:
            self._values[key] = compute()
            if len(self._values) > self._max_entries:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]
