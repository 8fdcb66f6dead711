"""A forward recorded once a job and replayed: a fast card does not wait for Python to launch its kernels. Exact.

Why. A step of SDXL at 1024x1024 is some thousands of short kernels. A fast card is done with each before the host has
launched the next: the job is as slow as the host's Python, and slower beside a busy neighbour.

How. The first forward of a job runs as ever, which also loads every kernel. The second is recorded into a CUDA graph,
where nothing computes. It and all after it are replays, on copies of their inputs in the place where the recorded
inputs were: the same kernels in the same order, so the same bits. A replay begins when the one before the last has
ended: the card never idles, and a cancelled job leaves it within a step.

What else may happen. A forward of another shape runs as ever. A recording that fails, for want of memory too, is given
up, the job goes on without it, and the log says so. When the block ends, the recording and its memory are gone: no
request sees another's.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.shadow import Spec

log = logging.getLogger(__name__)

AHEAD = 2  # replays in the card's queue: one that computes and one that waits
MAX_REASON = 200  # characters of a driver's message


class Recording(Protocol):
    """Work that the card can do again."""

    def replay(self) -> None: ...

    def reset(self) -> None:
        """Give its memory back."""


Record = Callable[[Callable[[], Tensor]], tuple[Recording, Tensor]]
"""Records what a function launches, without computing it: the recording, and where each replay leaves its result."""


@contextmanager
def replayed(unet: nn.Module, record: Record | None = None) -> Iterator["Replay"]:
    """Forwards of `unet` within the block, of one shape, are replays. `record`: None takes CUDA graphs."""
    replay = Replay(unet.forward, record or record_graph)
    unet.forward = replay
    try:
        yield replay
    finally:
        del unet.forward
        replay.forget()


class Replay:
    """Stands in for a UNet's forward during one job."""

    def __init__(self, forward: Callable[..., Any], record: Record) -> None:
        self.replays = 0
        self._forward = forward
        self._record = record
        self._known: Mapping[str, Spec] | None = None
        """Of the job's first forward."""
        self._inputs: dict[str, Tensor] = {}
        self._recording: Recording | None = None
        self._result: Tensor | None = None
        self._is_given_up = False
        self._queued: deque[torch.cuda.Event] = deque()

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        added_cond_kwargs: Mapping[str, Tensor],
        return_dict: bool,
        **unused: None,
    ) -> tuple[Tensor]:
        """As the pipelines call UNet2DConditionModel.forward; what of it they leave open must be None.

        Raises:
            ValueError: something else is asked for.
        """
        if return_dict or any(value is not None for value in unused.values()):
            raise ValueError(f"a replayed forward has no return_dict and none of {', '.join(unused)}")
        given = {"sample": sample, "timestep": timestep, "hidden": encoder_hidden_states, **added_cond_kwargs}
        known = {name: Spec.of(tensor) for name, tensor in given.items()}
        if self._known is None or self._known != known or self._is_given_up:
            self._known = self._known or known
            return (self._run(given),)
        if self._recording is None and not self._try_to_record(given):
            return (self._run(given),)
        return (self._again(given),)

    def forget(self) -> None:
        """Give the recording's memory back. What is queued is finished first."""
        while self._queued:
            self._queued.popleft().synchronize()
        if self._recording is not None:
            self._recording.reset()
        self._recording, self._result, self._inputs = None, None, {}

    def _run(self, given: Mapping[str, Tensor]) -> Tensor:
        added = {name: given[name] for name in given if name not in ("sample", "timestep", "hidden")}
        (out,) = self._forward(
            given["sample"], given["timestep"], given["hidden"], added_cond_kwargs=added, return_dict=False
        )
        result: Tensor = out
        return result

    def _try_to_record(self, given: Mapping[str, Tensor]) -> bool:
        device = given["sample"].device
        try:
            self._inputs = {name: tensor.to(device, copy=True) for name, tensor in given.items()}
            self._recording, self._result = self._record(lambda: self._run(self._inputs))
        except RuntimeError as error:
            self._is_given_up, self._inputs = True, {}
            log.warning("forwards are not replayed in this job: %s", " ".join(str(error).split())[:MAX_REASON])
        return self._recording is not None

    def _again(self, given: Mapping[str, Tensor]) -> Tensor:
        assert self._recording is not None, "replayed only once it is recorded"
        assert self._result is not None, "a recording has a result"
        if len(self._queued) == AHEAD:
            self._queued.popleft().synchronize()
        for name, tensor in given.items():
            self._inputs[name].copy_(tensor)
        self._recording.replay()
        self.replays += 1
        out = self._result.clone()  # the next replay writes there
        if out.is_cuda:
            self._queued.append(torch.cuda.current_stream(out.device).record_event())
        return out


def record_graph(run: Callable[[], Tensor]) -> tuple[Recording, Tensor]:
    """A CUDA graph of what `run` launches on the current card.

    Raises:
        RuntimeError: it does something that cannot be recorded, or there is no memory for it.
    """
    stream = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads may go on with the card: they read weights, or compile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = run()
    except RuntimeError:
        torch.cuda.set_stream(stream)  # a recording that fails leaves its own one behind
        raise
    return _Graph(graph), result


class _Graph:
    """A recording, and the memory that cuBLAS took in it: 32 MiB for the recording's stream, which it would keep."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def replay(self) -> None:
        self._graph.replay()

    def reset(self) -> None:
        self._graph.reset()
        torch._C._cuda_clearCublasWorkspaces()
