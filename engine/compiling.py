"""Compiling the block of a transformer once, for all its blocks and experts, without holding up the first job.

Why. Eager kernels write every intermediate to memory; fused ones do not. On an H200 a forward of the bf16 14B model
goes from 3.1 s to 2.7 s, a better attention kernel included, and with 8-bit layers the rounding of the activations
disappears into what precedes it: an eager 8-bit forward takes 3.1 s, twice that beside a compiler, and a compiled one
2.15 s. Blocks whose passes are fused by hand (engine.block8) gain little more than launches: 2.01 to 2.00 s.

What. Only the block is compiled, and only its forward: 40 blocks and both experts then share one graph, which takes
seconds where the whole model takes minutes. Hooks stay outside the graph, which the expert swap needs. Shapes are
static, because a dynamic graph is slower. A graph serves one number of tokens: landscape and portrait share one, and so
do all sizes of the same area in pixels and the same number of latent frames.

When. Compiling takes longer than the 5 s that it may delay a job. So it begins as early as the size is known, which is
when the job begins (`expect`), and runs in a thread that needs neither weights nor the card (see `block_graph`): with
artefacts of an earlier process one or two seconds, without them about ten. Meanwhile weights arrive and the prompt is
embedded. When the first block is called and the graph is not there,

- the job waits for it, at most PATIENCE_S in all its forwards together and once a size. A cancel is seen after that;
- then the blocks run eagerly until the graph is there. It is taken up at the next block, in the middle of a forward.

What gains little by a graph has no patience, and no compiler beside its forwards either, which takes the interpreter
from their launches: 0.3 to 1 s of a first job. Its graph is begun when they are over (`end_job`). A job that comes
before it is done launches beside it, with BLOCKS_AHEAD blocks before the card. What is warmed up waits for it (`wait`).

What else may happen.

- A module inside a block carries a hook (a LoRA at another strength, say): the block runs eagerly, because compiled
  code would pass the hook by.
- Compiling fails, or the first call of the code does, or there are more sizes than graphs are allowed: the eager block
  serves on, and `notes` says so.

What cannot be avoided: a first job may be partly eager, so it can differ in rounding from the next one.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.artefacts import Artefacts
from engine.block_graph import Backend, BlockGraph, tensor_names, tensors_of
from engine.shadow import Spec, Specs, describe

log = logging.getLogger(__name__)

MAX_GRAPHS = 8  # sizes compiled in one process; each costs seconds of a processor and megabytes
MAX_REASON = 200  # characters of a compiler's message, which can be pages
PATIENCE_S = 5.0
# Given to the card beside a compiler: 0.2 s of work at 832x480x81. The compiler keeps the interpreter as long at times,
# in calls that give no turns. Of the thousand launches that the card's queue holds these are less than half.
BLOCKS_AHEAD = 4


class Call(NamedTuple):
    """What a graph is made for: the tensors that a block is called with, and those that it holds."""

    args: tuple[Specs, ...]
    held: tuple[Spec, ...]
    is_inference: bool

    @property
    def tokens(self) -> int:
        """Of the block's first argument, (b, tokens, dim)."""
        first = self.args[0]
        assert isinstance(first, Spec)
        return first.shape[1]


class Account(NamedTuple):
    """What compiling has cost so far. A forward is one call of every block; a part of one counts as a part."""

    compile_s: float
    """In threads beside the jobs."""
    wait_s: float
    """In jobs."""
    eager_forwards: float
    compiled_forwards: float


class CompiledBlocks:
    """The compiled forward of the blocks of `models`, put in their place until `remove`."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        artefacts: Artefacts | None = None,
        backend: Backend = "inductor",
        device: str | None = None,
        patience_s: float | None = PATIENCE_S,
    ) -> None:
        """`models`: transformers whose `blocks` are of one structure. `device`: where they compute; None: where they
        are. `patience_s`: what a job waits for its graphs, all sizes together; None: it begins none either.

        Raises:
            ValueError: the blocks are not of one structure.
        """
        self.notes: list[str] = []
        self._blocks = [block for model in models for block in model.get_submodule("blocks").children()]
        if len({repr(block) for block in self._blocks}) > 1:
            raise ValueError("the blocks differ in their modules; one graph cannot serve them all")
        self._blocks_a_model = len(self._blocks) / len(models)
        first = self._blocks[0]
        self._eager: Callable[..., Tensor] = type(first).forward
        self._tensors = tensors_of(tensor_names(first))
        self.device = _device(device or self._tensors(first)[0].device)
        self._backend = backend
        self._artefacts = artefacts
        self._graphs: dict[Call, BlockGraph] = {}
        self._refused: set[Call] = set()
        self._met: dict[Call, nn.Module] = {}  # what a job would have had a graph for, with a block of it
        self.patience_s = patience_s
        self._patience_left_s = patience_s or 0.0
        self._ends: deque[torch.cuda.Event] = deque()  # of blocks that were given to the card
        self._wait_s, self._calls, self._eager_calls = 0.0, 0, 0
        run = self._run
        for block in self._blocks:
            block.forward = MethodType(lambda block, *args: run(block, args), block)

    @property
    def account(self) -> Account:
        """What it has cost since the start."""
        return Account(
            sum(graph.compile_s for graph in self._graphs.values()),
            self._wait_s,
            self._eager_calls / self._blocks_a_model,
            (self._calls - self._eager_calls) / self._blocks_a_model,
        )

    @property
    def ready(self) -> int:
        """How many sizes have a graph that serves."""
        return sum(graph.is_ready for call, graph in self._graphs.items() if call not in self._refused)

    def begin_job(self) -> None:
        """A job begins: it may wait as long as every job may."""
        self._patience_left_s = self.patience_s or 0.0

    def end_job(self) -> None:
        """Its forwards are over: begin the graphs that it met and did not begin."""
        met, self._met = self._met, {}
        for call, block in met.items():
            with torch.inference_mode(call.is_inference):
                self._graph(call, block)

    def expect(self, args: tuple[Specs, ...]) -> None:
        """Begin to compile for blocks that will be called with such arguments, in the mode that is on now.

        Weights need not be there; what counts is what they will be, on the device that was named at the start.
        """
        held = tuple(Spec.of(tensor)._replace(device=self.device) for tensor in self._tensors(self._blocks[0]))
        self._graph(Call(args, held, torch.is_inference_mode_enabled()), self._blocks[0])

    def wait(self) -> None:
        """Wait until nothing is being compiled behind."""
        for graph in list(self._graphs.values()):
            graph.join()

    def save(self) -> bool:
        """Keep what is new for the next process; False if nothing is, or it cannot be, or the compiler still works.

        Between jobs: it takes a moment. What the first run of a kernel finds out about it is kept too. What could not
        be written is tried again the next time: a disk that was full need not stay so.
        """
        new = [graph for graph in self._graphs.values() if graph.has_run and not graph.is_kept]
        if not new or any(graph.is_working for graph in self._graphs.values()):
            return False
        for graph in new:
            graph.is_kept = graph.kept is not None and graph.kept.save()
        return any(graph.is_kept for graph in new)

    @property
    def is_kept(self) -> bool:
        """Whether the next process will find every size."""
        return all(graph.is_kept for graph in self._graphs.values())

    def remove(self) -> None:
        """Give the blocks their own forward back."""
        self.wait()
        for block in self._blocks:
            del block.forward

    def _run(self, block: nn.Module, args: tuple[Any, ...]) -> Tensor:
        self._calls += 1
        if not _has_inner_hooks(block):
            out = self._compiled(block, args)
            if out is not None:
                return out
        self._eager_calls += 1
        out = self._eager(block, *args)
        if any(graph.is_working for graph in self._graphs.values()):
            self._let_others_run(out)
        return out

    def _let_others_run(self, out: Tensor) -> None:
        """Wait here, where waiting gives the interpreter away, while the card has BLOCKS_AHEAD blocks before it.

        A thread that fills the card's launch queue blocks inside the launch and may keep the interpreter: the compiler
        would get a share of it only between two forwards.
        """
        if out.is_cuda:
            self._ends.append(torch.cuda.Event(blocking=True))
            self._ends[-1].record(torch.cuda.current_stream(out.device))
            if len(self._ends) > BLOCKS_AHEAD:
                self._ends.popleft().synchronize()

    def _graph(self, call: Call, block: nn.Module) -> BlockGraph | None:
        """The graph for a call, begun if it is not there. None: this size runs eagerly for good."""
        if call in self._refused:
            return None
        if call not in self._graphs:
            if len(self._graphs) >= MAX_GRAPHS:
                self._refuse(call, f"more than {MAX_GRAPHS} sizes")
                return None
            kept = None if self._artefacts is None else self._artefacts.of(f"{type(block).__qualname__} {call}")
            self._graphs[call] = BlockGraph(self._eager, self._backend, block, call.args, self.device, kept)
        return self._graphs[call]

    def _wait_for(self, graph: BlockGraph) -> None:
        if graph.was_awaited or not graph.is_working:
            return
        graph.was_awaited = True
        started = time.monotonic()
        graph.join(self._patience_left_s)
        waited_s = time.monotonic() - started
        self._patience_left_s = max(0.0, self._patience_left_s - waited_s)
        self._wait_s += waited_s

    def _is_usable(self, call: Call, graph: BlockGraph) -> bool:
        if graph.is_working:
            return False
        if graph.problem is not None:
            self._refuse(call, graph.problem)
        elif not graph.is_ready:  # torch.compile was told to run eagerly meanwhile: try again with the next block
            del self._graphs[call]
        return graph.is_ready

    def _compiled(self, block: nn.Module, args: tuple[Any, ...]) -> Tensor | None:
        """The block's output by its graph; None if there is none, or its very first call fails."""
        held = tuple(Spec.of(tensor) for tensor in self._tensors(block))
        call = Call(tuple(describe(arg) for arg in args), held, torch.is_inference_mode_enabled())
        if self.patience_s is None and call not in self._graphs:
            self._met.setdefault(call, block)
            return None
        graph = self._graph(call, block)
        if graph is None:
            return None
        self._wait_for(graph)
        if not self._is_usable(call, graph):
            return None
        try:
            return graph(block, args)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            if graph.has_run:
                raise
            self._refuse(call, error)  # the first call loads and tunes kernels: it is the end of compiling
            return None

    def _refuse(self, call: Call, problem: object) -> None:
        self._refused.add(call)
        reason = " ".join(str(problem).split())[:MAX_REASON] or type(problem).__name__
        self.notes.append(f"blocks run uncompiled for {call.tokens} tokens: {reason}")
        log.warning("%s", self.notes[-1])


def _has_inner_hooks(block: nn.Module) -> bool:
    """Whether something inside the block is watched or adjusted: compiled code would not see that."""
    return any(child._forward_hooks or child._forward_pre_hooks for child in block.modules() if child is not block)


def _device(device: str | torch.device) -> torch.device:
    """With its number: tensors say cuda:0 where settings say cuda."""
    asked = torch.device(device)
    if asked.type != "cuda" or asked.index is not None:
        return asked
    return torch.device("cuda", torch.cuda.current_device())


def graph_count() -> int:
    """Graphs that torch.compile has captured in this process."""
    from torch._dynamo.utils import counters  # here: it imports the compiler, and most first jobs need none

    return int(counters["stats"]["unique_graphs"])
