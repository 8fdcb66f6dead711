"""What a decoder does to each pixel between two convolutions, each as one pass over memory where a card can.

All tensors are (frames, height, width, channels), contiguous: the channels of a pixel lie side by side, which is how
the tensor cores want them and how a norm over channels reads them. Two forms of the same functions: torch's own
operators here, for any device; engine.passes_triton for a card. A card's kernels prove themselves before they are used.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

log = logging.getLogger(__name__)

# Both forms in bf16 against each other: one rounds once, the other after each step. A wrong index or sum is below 10.
MIN_SNR_DB = 35.0
MAX_REASON = 200  # characters of a compiler's message, which can be pages
LOOK_BACK = 2  # frames that a causal convolution of length 3 sees before its own
MOST_STACKED_CHANNELS = 96  # of frames that are placed side by side; measured, see engine.fast_decode.StackedConv
SMALLEST_NORM = 1e-12  # as torch.nn.functional.normalize has it: a pixel of zeros stays zero


@dataclass(frozen=True)
class Passes:
    norm_silu: Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor], None]
    """x (f, h, w, c), bias (c,) or None, gamma (c,), kept, room: `place` of SiLU(RMS norm of (x + bias) * gamma)."""
    add: Callable[[Tensor, Tensor, Tensor], Tensor]
    """x (f, h, w, c), bias (c,), other as x: x + bias + other. May be written over x."""
    double_size: Callable[[Tensor], Tensor]
    """(f, h, w, c) -> (f, 2h, 2w, c), each pixel four times."""


def place(x: Tensor, kept: Tensor, room: Tensor) -> None:
    """Write x (f, h, w, c) to where a causal convolution reads it, after the frames kept of the chunk before.

    `kept`: (LOOK_BACK, h, w, c), the frames before x; becomes the last frames of both, for the next chunk.
    `room`: (LOOK_BACK + f, h, w, c), the frames kept and x; or (f, h, w, (LOOK_BACK + 1) * c), each frame of x after
    those before it, side by side, the oldest first.
    """
    c = x.shape[-1]
    for i, lane in enumerate(room.split(c, dim=-1)):
        before = LOOK_BACK - i
        lane[:before] = kept[i : i + lane.shape[0]]
        lane[before:] = x[: max(0, lane.shape[0] - before)]
    kept.copy_(torch.cat([kept, x[-LOOK_BACK:]])[-LOOK_BACK:])


def norm(x: Tensor, gamma: Tensor) -> Tensor:
    """RMS norm over the last axis, computed in fp32 and rounded once. `gamma`: (c,)."""
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
    return (wide * (x.shape[-1] ** 0.5 / length) * gamma.float()).to(x.dtype)


def _norm_silu(x: Tensor, bias: Tensor | None, gamma: Tensor, kept: Tensor, room: Tensor) -> None:
    place(functional.silu(norm(x if bias is None else x + bias, gamma)), kept, room)


def _add(x: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    return x + bias + other


def _double_size(x: Tensor) -> Tensor:
    f, h, w, c = x.shape
    return x[:, :, None, :, None].expand(f, h, 2, w, 2, c).reshape(f, 2 * h, 2 * w, c)


TORCH = Passes(_norm_silu, _add, _double_size)


def choose(device: str, channels: Iterable[int]) -> tuple[Passes, tuple[str, ...]]:
    """The passes for a decoder with these numbers of channels on `device`, and what should be said.

    On a card the kernels are compiled and compared here: two or three seconds where nothing is cached. See Chooser.
    """
    if torch.device(device).type != "cuda":
        return TORCH, ()
    try:
        from engine.passes_triton import TRITON

        failed = [count for count in sorted(set(channels)) if not agree(TRITON, device, count)]
    except Exception as error:  # noqa: BLE001 no compiler, no library, a kernel that the card refuses: the decode goes on
        return TORCH, (f"decode without fused passes: {type(error).__name__}: {str(error)[:MAX_REASON]}",)
    if failed:
        return TORCH, (f"decode without fused passes: wrong results with {failed} channels",)
    return TRITON, ()


class Chooser:
    """`choose`, once, in a thread beside the card's work, which takes longer than that.

    The kernels prove themselves on a stream of their own: on the job's each comparison would wait for all its forwards.
    """

    def __init__(self, device: str, channels: Iterable[int]) -> None:
        self._device = device
        self._channels = set(channels)
        self._thread: threading.Thread | None = None
        self._chosen, self._notes = TORCH, tuple[str, ...]()

    def begin(self) -> None:
        """Begin, if nobody has."""
        if self._thread is None:
            thread = threading.Thread(target=self._choose, name="passes", daemon=True)
            thread.start()  # first: one that the system refuses to start must not be waited for
            self._thread = thread

    def join(self) -> None:
        """Wait until it is at work no more, if it has begun."""
        if self._thread is not None:
            self._thread.join()

    def chosen(self) -> Passes:
        """The passes, once they are chosen; begins if nobody has. What should be said is logged, once."""
        self.begin()
        self.join()
        for note in self._notes:
            log.info("%s", note)
        self._notes = ()
        return self._chosen

    def _choose(self) -> None:
        is_card = torch.device(self._device).type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream(self._device)) if is_card else nullcontext():
            self._chosen, self._notes = choose(self._device, self._channels)


def agree(passes: Passes, device: str, channels: int) -> bool:
    """Whether `passes` give what torch's operators give, on a few pixels of bf16."""
    generator = torch.Generator(device).manual_seed(channels)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    x, other = draw(3, 3, 5, channels), draw(3, 3, 5, channels)
    gamma, bias = draw(channels), draw(channels)
    kept = draw(LOOK_BACK, 3, 5, channels)
    pairs = [(passes.double_size(x), TORCH.double_size(x))]
    # A first chunk is one frame long. Frames side by side are a kernel more, compiled where it will be used.
    for given, few, stacked in product((None, bias), (x[:1], x), {False, channels <= MOST_STACKED_CHANNELS}):
        f = few.shape[0]
        shape = (f, 3, 5, (LOOK_BACK + 1) * channels) if stacked else (LOOK_BACK + f, 3, 5, channels)
        # What is not written must not pass.
        mine, torchs = ((kept.clone(), torch.full(shape, float("nan")).to(x)) for _ in range(2))
        passes.norm_silu(few, given, gamma, *mine)
        TORCH.norm_silu(few, given, gamma, *torchs)
        pairs += zip(mine, torchs, strict=True)
    pairs.append((passes.add(x.clone(), bias, other), TORCH.add(x, bias, other)))
    return all(_snr_db(mine, torchs) > MIN_SNR_DB for mine, torchs in pairs)


def _snr_db(made: Tensor, wanted: Tensor) -> float:
    error = (made.float() - wanted.float()).square().sum()
    return float(10 * torch.log10(wanted.float().square().sum() / error))
