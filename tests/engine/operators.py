"""Which operators of torch a block calls."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Of a tensor on a card: Python asks for its value, and waits until it is computed.
QUESTIONS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)


class Operators(TorchDispatchMode):
    """Inside the block, how often each is called."""

    def __init__(self) -> None:
        super().__init__()
        self.called = Counter[Any]()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called[func] += 1
        return func(*args, **(kwargs or {}))

    @property
    def questions(self) -> int:
        return sum(self.called[each] for each in QUESTIONS)
