"""What the words of an exception say about the card: out of memory, poisoned, or neither."""

import pytest
import torch

from engine.card_errors import card_error
from schemas.errors import GpuFault, OutOfMemory

OF_A_CONVOLUTION = "GET was unable to find an engine to execute this computation"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError(OF_A_CONVOLUTION),
        RuntimeError(OF_A_CONVOLUTION.replace("GET", "FIND")),
    ],
    ids=str,
)
def test_card_without_room_is_out_of_memory(error: RuntimeError) -> None:
    assert isinstance(card_error(error), OutOfMemory)


@pytest.mark.parametrize("words", ["CUDA driver error: unspecified launch failure", "CUDA driver error: unknown error"])
def test_card_that_failed_is_a_gpu_fault(words: str) -> None:
    assert isinstance(card_error(RuntimeError(words)), GpuFault)


@pytest.mark.parametrize("words", ["shape mismatch", "[enforce fail] DefaultCPUAllocator: can't allocate memory"])
def test_what_is_not_the_cards_is_neither(words: str) -> None:
    assert card_error(RuntimeError(words)) is None
