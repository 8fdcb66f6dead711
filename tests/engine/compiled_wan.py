"""A tiny transformer with compiled blocks, and a compiler that can be held."""

import threading

import torch

from engine.block_inputs import block_inputs
from engine.compiling import CompiledBlocks
from engine.geometry import LatentShape
from tests.engine.tiny_wan import wan_inputs

FOR_EVER_S = 120.0  # a job that waits as long as it takes meets the compiled code in its first forward
CPU = torch.device("cpu")


class Gate:
    """A compiler that does nothing until it is told to."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.threads: list[str] = []

    def __call__(self, graph, inputs):
        self.threads.append(threading.current_thread().name)
        assert self.is_open.wait(FOR_EVER_S)
        return graph.forward


def patient(*models, backend="eager") -> CompiledBlocks:
    return CompiledBlocks(models, backend=backend, patience_s=FOR_EVER_S)


def forward(model, height: int = 4) -> torch.Tensor:
    with torch.inference_mode():
        return model(**wan_inputs(height)).sample


def announce(blocks: CompiledBlocks, model, height: int = 4) -> None:
    with torch.inference_mode():
        blocks.expect(block_inputs(model, LatentShape(2, height, 4), CPU))
