"""The way of a small tensor to a card that is at work, and back.

A copy from ordinary host memory waits until the card has done all that it was given before, and the host with it:
nothing more is launched meanwhile, and afterwards the card waits for the launches. From page-locked memory it takes its
place behind that work, and the host goes on.
"""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A CPU tensor on `device`, in the order of the card's work; the host waits for none of it.

    The allocator of page-locked memory does not give a block away before the copy from it has ended.
    """
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    # Not tensor.pin_memory(), which fails where places share their memory, as those of an expanded mask do.
    locked = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return locked.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, page-locked if the tensor is on a card, in the order of the card's work.

    The host waits for none of it, so it may read the copy only after it has waited for the card; a copy back to the
    card comes after it by the same order.
    """
    if tensor.device.type != "cuda":
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
