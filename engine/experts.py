"""Where the experts of a transformer live, and how one takes another's place without a pause.

Why. Wan2.2 has two transformers of one architecture: the first steps run on one, the rest on the other. In bfloat16
each is 28.6 GB, so a 48 GB card holds one. The usual way out copies whole models back and forth through pageable
memory, 20 seconds a job and more.

How. All experts stay in page-locked host memory, one flat buffer a piece: a transformer block, or what stands before
(entry) or after (exit) the blocks. The card holds ONE set of buffers with the same layout, and the model's parameters
are views of them. An expert is brought in by copying into those buffers, so no address ever changes: compiled graphs
stay valid and the allocator sees nothing.

Rolling. In the last forward of an expert a block is not needed any more once it has run. A hook after block i lets a
second stream wait for that moment and copy block i of the next expert into the same bytes, while the blocks after it
still compute. At 25 GB/s the copy takes 1.1 s and a forward takes more than 2, so only the last block's 30 ms show.
The way back to the first expert hides behind the last forward of the job.

Streaming is the same rule with fewer buffers. With n blocks and s slots, block i always runs in slot i % s, and after
it ran its slot is next needed by block i + s. With s = n that is block i of the next forward, which only another
expert's turn makes a copy of; with s = 2 every block of every forward is copied while its neighbour computes.

Parking (see engine.parking) gives the card's buffers back and makes new ones: the addresses change then, between jobs,
and the next `use` brings in what it needs.

Safety. Each slot says which block of which expert it holds; the tag is taken away before a copy and set after it.
Whatever went wrong in between, `use` copies every slot whose tag is not the wanted one, so a mixed model cannot run.

Hooks must stay outside compiled code: compile `block.forward`, not the block (see `compiling`).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn

from engine.arrival import Coming
from engine.packing import BLOCKS, HostCopy, layout, point_at


class Experts(Protocol):
    """What a denoising loop needs to know."""

    bytes_moved: int
    """Host to device, since the start."""

    def use(self, expert: str, forwards: int = 0, then: str | None = None) -> Any:
        """A context whose value is the model to call.

        `forwards`: how many calls the context will see, `then`: who comes after it. Both are hints: with
        them the change is hidden behind the last call, without them it waits until the next `use`.
        """


class FixedExperts:
    """Every expert on the card for good: nothing moves."""

    bytes_moved = 0

    def __init__(self, models: Mapping[str, nn.Module], coming: Mapping[str, Coming] = MappingProxyType({})) -> None:
        """`coming`: those of the experts whose weights are still being read."""
        self._models = dict(models)
        self._coming = dict(coming)

    @contextmanager
    def use(self, expert: str, forwards: int = 0, then: str | None = None) -> Iterator[nn.Module]:  # noqa: ARG002 no hint is needed here
        model = self._models[expert]
        with ExitStack() as hooks:
            if expert in self._coming:
                for handle in self._coming[expert].hold_back(model):
                    hooks.callback(handle.remove)
            yield model


class RollingExperts:
    """Experts of one architecture that share one set of buffers on the card. The modules given are taken over."""

    def __init__(
        self,
        experts: Mapping[str, nn.Module],
        device: str,
        slots: int | None = None,
        coming: Mapping[str, tuple[HostCopy, Coming]] = MappingProxyType({}),
    ) -> None:
        """`slots`: blocks that the card holds at a time; all of them if None. `coming`: where those of the experts
        stand that are still being read; the others are whole, and are copied.

        Raises:
            ValueError: the experts differ in layout, or fewer slots than blocks and the blocks differ.
        """
        models = list(experts.values())
        self._pieces = layout(models[0])
        if any(layout(model) != self._pieces for model in models[1:]):
            raise ValueError("the experts differ in their tensors; they cannot share storage")
        self._blocks = len(self._pieces) - 2
        self._slots = slots or self._blocks
        if self._slots < self._blocks and len({p.fields for p in self._pieces[2:]}) > 1:
            raise ValueError("the blocks differ in their tensors; they cannot share slots")
        self.bytes_moved = 0
        self._stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        with torch.inference_mode(False):  # an inference tensor could not be copied into outside that mode
            self._coming = {name: of for name, (_, of) in coming.items()}
            self._host = {
                name: coming[name][0] if name in coming else HostCopy.of(model, self._pieces, device)
                for name, model in experts.items()
            }
        self._device = device
        self.model = models[0]
        self._card: list[torch.Tensor] = []
        self._holds: list[tuple[str, int] | None] = []
        self._arrival: list[torch.cuda.Event | None] = []
        self.bring_back()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the operator should know; the same for every expert, so said once."""
        return next((host.notes for host in self._host.values() if host.notes), ())

    @contextmanager
    def use(self, expert: str, forwards: int = 0, then: str | None = None) -> Iterator[nn.Module]:
        """See Experts.use. Raises RuntimeError, inside the block, on a call after the last of `forwards`."""
        if then is not None and then not in self._host:
            raise ValueError(f"{then} is none of the experts {', '.join(self._host)}")
        self.prefetch(expert)
        turn = _Turn(self, expert, forwards, then)
        with ExitStack() as hooks:
            for handle in turn.hooks():
                hooks.callback(handle.remove)
            yield self.model

    def prefetch(self, expert: str) -> None:
        """Start bringing in what is read of `expert`; its first forward waits for each piece as it needs it."""
        for i in range(len(self._card)):
            self.prepare(expert, i)

    def repair(self, expert: str) -> int:
        """After any failure: forget half-made copies and bring `expert` in whole. Returns the bytes copied for it."""
        before = self.bytes_moved
        self.prefetch(expert)
        return self.bytes_moved - before

    def prepare(self, expert: str, i: int) -> None:
        """`place`, unless the piece is still being read: then it is placed by whoever needs it."""
        if expert not in self._coming or self._coming[expert].is_there(i):
            self.place(expert, i)

    def place(self, expert: str, i: int) -> None:
        """Copy piece `i` of `expert` into its slot once the card has done all work given to it so far."""
        slot = self._slot(i)
        if self._holds[slot] == (expert, i):
            return
        self._holds[slot] = None
        if self._stream is None:
            self._copy(expert, i)
        else:
            done = torch.cuda.current_stream(self._stream.device).record_event()
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(done)
                self._copy(expert, i)
                self._arrival[slot] = self._stream.record_event()
        self._holds[slot] = (expert, i)
        self.bytes_moved += self._pieces[i].size_bytes

    def arrive(self, expert: str, i: int) -> None:
        """Make the card's next work wait until piece `i` of `expert` is there, and the host until it is read."""
        if expert in self._coming:
            self._coming[expert].wait(i)
        self.place(expert, i)
        slot = self._slot(i)
        arrival, self._arrival[slot] = self._arrival[slot], None
        if arrival is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(arrival)

    def next_in_slot(self, i: int) -> tuple[int, bool]:
        """Which block needs block i's slot next, and whether that is in the next forward."""
        following = i + self._slots
        return (following, False) if following < self._blocks else (i % self._slots, True)

    @property
    def is_whole(self) -> bool:
        return all(coming.is_whole for coming in self._coming.values())

    @property
    def needed_bytes(self) -> int:
        return 0

    @property
    def held_bytes(self) -> int:
        return sum(host.size_bytes for host in self._host.values())

    def park(self) -> int:
        """The host copies are there: nothing is copied. A `use` before `bring_back` fails."""
        self._settle()
        host = next(iter(self._host.values()))
        for piece, buffer in zip(self._pieces, host.buffers, strict=True):
            point_at(self.model, piece, buffer)
        self._card, self._holds, self._arrival = [], [], []
        return 0

    def bring_back(self) -> int:
        """Room on the card that holds no expert yet; what is copied into it is in `bytes_moved`."""
        with torch.inference_mode(False):
            self._card = [
                torch.empty(piece.size_bytes, dtype=torch.uint8, device=self._device)
                for piece in self._pieces[: 2 + self._slots]
            ]
            for i, piece in enumerate(self._pieces):
                point_at(self.model, piece, self._card[self._slot(i)])
        self._holds = [None] * len(self._card)
        self._arrival = [None] * len(self._card)
        return 0

    def unload(self) -> None:
        """Give back card and host memory. The model is empty afterwards."""
        self._settle()
        self.model.to("meta")
        for host in self._host.values():
            host.release()
        self._card, self._host = [], {}

    def _settle(self) -> None:
        """Wait for the copies: what they read from or write to is about to go."""
        if self._stream is not None:
            torch.cuda.synchronize(self._stream.device)

    def _slot(self, i: int) -> int:
        return i if i < 2 else 2 + (i - 2) % self._slots

    def _copy(self, expert: str, i: int) -> None:
        self._card[self._slot(i)].copy_(self._host[expert].buffers[i], non_blocking=True)


class _Turn:
    """One `use`: counts the calls, makes each piece arrive before it runs, and lets the next expert in behind it."""

    def __init__(self, experts: RollingExperts, expert: str, forwards: int, then: str | None) -> None:
        self._experts = experts
        self._expert = expert
        self._forwards = forwards
        self._then = then
        self._calls = 0

    def hooks(self) -> Iterator[Any]:
        model = self._experts.model
        yield model.register_forward_pre_hook(self._before_model)
        yield model.register_forward_hook(self._after_model)
        blocks = list(model.get_submodule(BLOCKS.rstrip(".")).children())
        for i, block in enumerate(blocks):
            yield block.register_forward_pre_hook(lambda *_, i=i: self._experts.arrive(self._expert, 2 + i))
            yield block.register_forward_hook(lambda *_, i=i: self._after_block(i))
        # What stands after the blocks is last in the file too: not to be waited for before they run.
        yield blocks[-1].register_forward_hook(lambda *_: self._experts.arrive(self._expert, 1))

    @property
    def _is_last(self) -> bool:
        return self._forwards > 0 and self._calls == self._forwards

    def _before_model(self, *_: object) -> None:
        self._calls += 1
        if self._forwards and self._calls > self._forwards:
            raise RuntimeError(f"expert {self._expert} was announced for {self._forwards} forwards and is called again")
        self._experts.arrive(self._expert, 0)

    def _after_block(self, i: int) -> None:
        following, is_next_forward = self._experts.next_in_slot(i)
        expert: str | None = self._expert
        if is_next_forward and self._is_last:
            expert = self._then
        if expert is not None:
            self._experts.prepare(expert, 2 + following)
        if i == 0 and self._is_last and self._then is not None:
            self._experts.prepare(self._then, 0)

    def _after_model(self, *_: object) -> None:
        if self._is_last and self._then is not None:
            self._experts.prepare(self._then, 1)
