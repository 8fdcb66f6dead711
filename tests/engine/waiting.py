"""A host that must not wait for its card."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def never_waiting() -> Iterator[None]:
    """Inside the block, whoever makes the host wait for the card fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it does not find all of them
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
