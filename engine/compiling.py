"""Compiling the block of a transformer once, for all its blocks and experts, without holding up the first job.

Why. Eager kernels write every intermediate to memory; fused ones do not. On an H200 a forward of the bf16 14B model
goes from 3.1 s to 2.7 s, a better attention kernel included, and with 8-bit layers the rounding of the activations
disappears into what precedes it.

What. Only the block is compiled, and only its forward: 40 blocks and both experts then share one graph, which takes
seconds where the whole model takes minutes. Hooks stay outside the graph, which the expert swap needs. Shapes are
static (a graph for each number of tokens; landscape and portrait have the same number), because a dynamic graph is
slower and one recompilation too many would stop a job.

When. A graph that is not there yet must not delay a job by more than 5 s, and compiling can take longer than that.

- An earlier process left its artefacts: compiling is tracing and reading them, one or two seconds, in the first
  forward.
- It did not: the job runs eagerly. A thread compiles meanwhile, on tensors without storage, up to the point where the
  result would run, and throws it away: what remains is the compiler's cache. The next forward after that finds it
  there. The thread takes no memory of the card; it shares the interpreter with the eager forward, which meanwhile
  waits for the card after each block, so that there is something to share.
- A module inside a block carries a hook (a LoRA at another strength, say): the block runs eagerly, because compiled
  code would pass the hook by.
- Compiling fails, or there are more sizes than graphs are allowed: the eager block serves on, and `notes` says so.

What cannot be avoided: the forward that adopts a graph traces it once more, since a trace cannot be handed from one
set of tensors to another; and a first job may be partly eager, so it can differ in rounding from the next one.
"""

import copy
import hashlib
import logging
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

log = logging.getLogger(__name__)

MAX_GRAPHS = 8  # sizes compiled in one process; each call checks them one after the other
# Dynamo counts graphs a code object, and both video models have the same block: leave room for two sets.
RECOMPILE_LIMIT = 4 * MAX_GRAPHS
MAX_REASON = 200  # characters of a compiler's message, which can be pages

Signature = tuple[tuple[tuple[int, ...], torch.dtype], ...]
"""Shape and type of each tensor that a block is called with."""


@dataclass(frozen=True)
class Artefacts:
    """Where compiled graphs are kept between processes.

    The files are executed when they are read: `folder` must be writable by nobody but the operator.
    """

    folder: Path
    variant: str
    """What else decides the graphs: precision and attention kernel, as fp8-flash4."""

    @property
    def path(self) -> Path:
        """One file for this variant on this card with these versions."""
        parts = [self.variant, _card(), *(f"{name} {_version(name)}" for name in ("torch", "triton", "diffusers"))]
        return self.folder / f"compiled-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.bin"

    def load(self) -> bool:
        """Put what is there into the compiler's cache; False if nothing usable is."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return False
        try:
            return torch.compiler.load_cache_artifacts(content) is not None
        except Exception as error:  # noqa: BLE001 a damaged file fails in any way, and is as good as none
            log.warning("compiled kernels could not be read (%s); compiling anew", type(error).__name__)
            return False

    def save(self) -> bool:
        """Write everything this process has compiled; False if that is nothing. A reader never sees half a file."""
        saved = torch.compiler.save_cache_artifacts()
        if saved is None:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            file.write(saved[0])
        Path(file.name).replace(self.path)
        return True


class CompiledBlocks:
    """The compiled forward of the blocks of `models`, put in their place until `remove`."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        artefacts: Artefacts | None = None,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        """`models`: transformers whose `blocks` are of one class. `backend`: of torch.compile."""
        self.notes: list[str] = []
        self._blocks = [block for model in models for block in model.get_submodule("blocks").children()]
        self._eager: Callable[..., Tensor] = type(self._blocks[0]).forward
        self._backend = backend
        self._compiled = torch.compile(self._eager, backend=backend, fullgraph=True, dynamic=False)
        self._artefacts = artefacts
        self._is_warm = artefacts is not None and artefacts.load()
        self._ready: set[Signature] = set()
        self._refused: set[Signature] = set()
        self._behind: dict[Signature, _Behind] = {}
        self._is_saved = True
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        self._hooks = [model.register_forward_pre_hook(lambda *_: self.adopt()) for model in models]
        run = self._run
        for block in self._blocks:
            block.forward = MethodType(lambda block, *args: run(block, args), block)

    def adopt(self) -> None:
        """Take up what has been compiled behind; called at the start of every forward."""
        for signature, behind in list(self._behind.items()):
            if behind.is_alive():
                continue
            del self._behind[signature]
            if behind.problem is not None:
                self._refuse(signature, behind.problem)
            elif behind.has_compiled:
                self._ready.add(signature)

    def wait(self) -> None:
        """Wait until nothing is being compiled behind, then take it up."""
        for behind in list(self._behind.values()):
            behind.join()
        self.adopt()

    def save(self) -> bool:
        """Keep what is new for the next process; False if nothing is. Between jobs: it takes a moment."""
        if self._artefacts is None or self._is_saved:
            return False
        self._is_saved = True
        return self._artefacts.save()

    def remove(self) -> None:
        """Give the blocks their own forward back."""
        self.wait()
        for hook in self._hooks:
            hook.remove()
        for block in self._blocks:
            del block.forward

    def _run(self, block: nn.Module, args: tuple[Any, ...]) -> Tensor:
        signature = _signature(args)
        if _has_inner_hooks(block) or (signature not in self._ready and not self._begin(signature, block, args)):
            eager = self._eager(block, *args)
            if signature in self._behind:
                _let_others_run(eager)
            return eager
        try:
            out: Tensor = self._compiled(block, *args)
        except TorchDynamoException as error:
            self._ready.discard(signature)
            self._refuse(signature, error)
            return self._eager(block, *args)
        return out

    def _begin(self, signature: Signature, block: nn.Module, args: tuple[Any, ...]) -> bool:
        """Decide about a size that has no graph yet. True: compile it now."""
        if signature in self._refused or signature in self._behind:
            return False
        if len(self._ready) + len(self._behind) >= MAX_GRAPHS:
            self._refuse(signature, f"more than {MAX_GRAPHS} sizes")
            return False
        self._is_saved = False
        if self._is_warm:
            self._ready.add(signature)
            return True
        self._behind[signature] = _Behind(self._eager, self._backend, block, args)
        self._behind[signature].start()
        return False

    def _refuse(self, signature: Signature, problem: object) -> None:
        self._refused.add(signature)
        reason = " ".join(str(problem).split())[:MAX_REASON] or type(problem).__name__
        self.notes.append(f"blocks run uncompiled for {signature[0][0][1]} tokens: {reason}")
        log.warning("%s", self.notes[-1])


def _let_others_run(out: Tensor) -> None:
    """Wait for the card here, where waiting gives the interpreter away.

    A thread that fills the card's launch queue blocks inside the launch and keeps the interpreter: the compiler would
    get a share of it only between two forwards. 40 waits a forward cost some milliseconds.
    """
    if out.is_cuda:
        torch.cuda.current_stream(out.device).synchronize()


class _Compiled(BaseException):
    """Leaves a compiled function at the moment it would run. No library code catches it on the way."""


class _Behind(threading.Thread):
    """Compiles a block for one signature without running it. `problem`: what went wrong, if anything.

    `has_compiled` stays False where torch.compile was told to run eagerly meanwhile; then it may be tried again.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        backend: str | Callable[..., Any],
        block: nn.Module,
        args: tuple[Any, ...],
    ) -> None:
        super().__init__(name="compile-behind", daemon=True)
        self.problem: Exception | None = None
        self.has_compiled = False
        self._function = torch.compile(function, backend=_compile_only(backend), fullgraph=True, dynamic=False)
        self._mode = FakeTensorMode()
        self._block = _without_storage(block, self._mode)
        self._args = tuple(_fake(arg, self._mode) for arg in args)
        self._inference = torch.is_inference_mode_enabled()  # guarded by the graph; a thread starts without it

    def run(self) -> None:
        try:
            with torch.inference_mode(self._inference), torch.no_grad(), self._mode:
                self._function(self._block, *self._args)
        except _Compiled:
            self.has_compiled = True
        except Exception as error:  # noqa: BLE001 whatever a compiler raises, the job goes on eagerly and it is said
            self.problem = error


def _compile_only(backend: str | Callable[..., Any]) -> Callable[..., Any]:
    compile_graph = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend

    def compile_and_leave(graph: Any, inputs: Any) -> Callable[..., Any]:
        compile_graph(graph, inputs)

        def leave(*_: object) -> None:
            raise _Compiled

        return leave

    return compile_and_leave


def _without_storage(block: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of the block whose tensors have shapes, types and a device, and no memory."""
    memo: dict[int, Any] = {}
    for tensor in [*block.parameters(), *block.buffers()]:
        fake = mode.from_tensor(tensor.detach())
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
    forward = block.__dict__.pop("forward")  # ours, bound to the real block
    try:
        return copy.deepcopy(block, memo)
    finally:
        block.__dict__["forward"] = forward


def _has_inner_hooks(block: nn.Module) -> bool:
    """Whether something inside the block is watched or adjusted: compiled code would not see that."""
    return any(child._forward_hooks or child._forward_pre_hooks for child in block.modules() if child is not block)


def _fake(arg: Any, mode: FakeTensorMode) -> Any:
    if isinstance(arg, Tensor):
        return mode.from_tensor(arg)
    return tuple(_fake(item, mode) for item in arg) if isinstance(arg, tuple) else arg


def _signature(args: tuple[Any, ...]) -> Signature:
    flat = [item for arg in args for item in (arg if isinstance(arg, tuple) else (arg,))]
    return tuple((tuple(item.shape), item.dtype) for item in flat)


def graph_count() -> int:
    """Graphs that torch.compile has captured in this process."""
    return int(counters["stats"]["unique_graphs"])


def _card() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} {major}.{minor} CUDA {torch.version.cuda}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
