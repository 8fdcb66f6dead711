"""A block's forward, compiled for one size by a thread that needs neither weights nor activations.

torch.compile is a function that traces, compiles and runs, in that order, in whoever calls it. Here it is called in a
thread, on shadows (see `shadow`), and left at the moment it would run. What remains is the compiled code and the order
in which it wants the block's tensors. Both fit every block of the same structure, so the job calls the code itself:
nothing is traced again for it, and the job never waits for the compiler's lock while another size is compiled. What
Dynamo would have guarded is compared by `CompiledBlocks`: shapes, strides, types and device of all tensors.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as NotReadyError
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.artefacts import Artefacts
from engine.shadow import Specs, fakes, shadow
from engine.turns import short_turns

log = logging.getLogger(__name__)

Backend = str | Callable[..., Any]
"""Of torch.compile."""

_POOL_LOCK = threading.Lock()
# Dynamo counts graphs a code object, and both video models have the same block. More than a process has sizes for.
RECOMPILE_LIMIT = 32
POOL_READY_S = 20.0  # the compiler's worker processes import torch first; without them kernels are made one by one


class _Compiled(BaseException):
    """Leaves a compiled function at the moment it would run. No library code catches it on the way."""

    def __init__(self, given: tuple[Tensor, ...]) -> None:
        self.given = given


class BlockGraph:
    """One size's code. Compiling begins at once; `problem` says what went wrong, if anything."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        backend: Backend,
        block: nn.Module,
        args: tuple[Specs, ...],
        device: torch.device,
        kept: Artefacts | None = None,
    ) -> None:
        """`function`: the eager forward, called as function(block, *args). `kept`: this size's artefacts."""
        self.problem: Exception | None = None
        self.is_ready = False
        self.was_awaited = False
        self.has_run = False
        self.is_kept = False
        """Whether the artefacts hold all of it."""
        self.compile_s = 0.0
        self.kept = kept
        self._function = function
        self._backend = backend
        self._block = block
        self._args = args
        self._device = device
        self._is_inference = torch.is_inference_mode_enabled()  # part of the code; a thread starts without it
        self._code: Callable[..., Any] = _nothing
        self._of_block: Callable[[nn.Module], Any] = _nothing
        self._order: tuple[int, ...] = ()
        self._thread = threading.Thread(target=self._work, name="compile-behind", daemon=True)
        self._thread.start()

    @property
    def is_working(self) -> bool:
        """Whether the compiler has not finished."""
        return self._thread.is_alive()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the compiler, at most this long."""
        self._thread.join(timeout_s)

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> Tensor:
        """The block's output, by the compiled code."""
        given = (*self._of_block(block), *_flat(args))
        (out,) = self._code(*[given[i] for i in self._order])
        self.has_run = True
        result: Tensor = out
        return result

    def _work(self) -> None:
        from torch._dynamo.utils import counters  # here: it imports the compiler, and a job may need none

        started = time.monotonic()
        try:
            with short_turns():
                was_loaded = self.kept is not None and self.kept.load()
                if not was_loaded:
                    _wait_for_workers(self._device)
                missed = counters["inductor"]["fxgraph_cache_miss"]
                self._compile()
                self.is_kept = was_loaded and counters["inductor"]["fxgraph_cache_miss"] == missed
        except Exception as error:  # noqa: BLE001 whatever a compiler raises, the job goes on eagerly and it is said
            self.problem = error
        self.compile_s = time.monotonic() - started
        if self.is_ready:
            log.info("compiled behind in %.1f s%s", self.compile_s, ", from the cache" if self.is_kept else "")

    def _compile(self) -> None:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        compiled = torch.compile(self._function, backend=self._keep, fullgraph=True, dynamic=False)
        with torch.inference_mode(self._is_inference), torch.no_grad(), FakeTensorMode():
            block = shadow(self._block, self._device)
            args = fakes(self._args)
            try:
                compiled(block, *args)
            except _Compiled as left:
                self._learn_order(block, args, left.given)
                self.is_ready = True

    def _keep(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        """What torch.compile calls to have a traced graph compiled."""
        if list(graph.parameters()) or list(graph.buffers()):
            raise ValueError("the traced block holds tensors of its own; its code would fit one block only")
        if len(graph.graph.output_node().args[0]) != 1:
            raise ValueError("the traced block has more than one result")
        compile_graph = torch._dynamo.lookup_backend(self._backend) if isinstance(self._backend, str) else self._backend
        self._code = compile_graph(graph, inputs)

        def leave(*given: Tensor) -> None:
            raise _Compiled(given)

        return leave

    def _learn_order(self, block: nn.Module, args: tuple[Any, ...], given: tuple[Tensor, ...]) -> None:
        """Find each tensor that the code was given among the block's and the arguments."""
        names = tensor_names(block)
        of_block = tensors_of(names)
        known = {id(tensor): i for i, tensor in enumerate((*of_block(block), *_flat(args)))}
        self._order = tuple(known[id(tensor)] for tensor in given)
        self._of_block = of_block


def tensor_names(block: nn.Module) -> tuple[str, ...]:
    """Dotted names of the block's parameters and buffers, in one order for all blocks of a structure."""
    return tuple(name for name, _ in (*block.named_parameters(), *block.named_buffers()))


def tensors_of(names: tuple[str, ...]) -> Callable[[nn.Module], tuple[Tensor, ...]]:
    """A function from a block to its tensors of these names, as they are when it is called."""
    if len(names) > 1:
        get: Any = attrgetter(*names)
        return lambda block: tuple(get(block))
    return lambda block: tuple(attrgetter(name)(block) for name in names)


def start_workers(device: torch.device) -> None:
    """Let the compiler's worker processes come up, which takes seconds, before there is something to compile."""
    if device.type == "cuda":
        threading.Thread(target=_start_workers, name="compiler-workers", daemon=True).start()


def _start_workers() -> None:
    from torch._inductor.async_compile import AsyncCompile

    with _POOL_LOCK:
        AsyncCompile.warm_pool()
        AsyncCompile.wakeup()


def _wait_for_workers(device: torch.device) -> None:
    if device.type != "cuda":
        return
    from torch._inductor.async_compile import AsyncCompile

    try:
        with _POOL_LOCK:  # the pool's maker has none of its own, and two threads may ask at once
            AsyncCompile.use_process_pool()
        AsyncCompile.wait_pool_ready(POOL_READY_S)
    except NotReadyError:
        log.warning("the compiler's worker processes are not up after %.0f s; compiling without them", POOL_READY_S)


def _flat(args: tuple[Any, ...]) -> list[Tensor]:
    return [item for arg in args for item in (arg if isinstance(arg, tuple) else (arg,))]


def _nothing(*_: object) -> Any:
    raise RuntimeError("nothing is compiled yet")
