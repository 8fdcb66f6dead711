"""What a job does, seen from outside: seconds of each call of a model, memory, and how the whole divides."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bench.timing import Memory, between, mark, memory, restart_peak
from engine.geometry import LatentShape
from engine.progress import SHARES

FORWARDS = ("transformer", "transformer_2", "unet", "refiner_unet")
TEXT = ("text_encoder", "text_encoder_2")
PICTURE = ("image_encoder",)
ENCODE, DECODE = "vae.encode", "vae.decode"


@dataclass
class Sample:
    """One job."""

    seconds: float
    stages_s: dict[str, float]
    """As the arm itself tells them."""
    calls_s: dict[str, list[float]]
    """Model -> seconds of each of its calls, on the card's clock."""
    tokens: int
    """Of a transformer's forward; 0 for a UNet."""
    memory: Memory

    def forwards_s(self) -> list[float]:
        """Seconds of every forward of a transformer or UNet."""
        return [spent for name in FORWARDS for spent in self.calls_s.get(name, [])]

    def parts_s(self) -> dict[str, float]:
        """How the job's seconds divide; `rest` is what nobody claims, `file` what follows the last frame.

        Text, picture, encode, forwards and decode are the card's seconds inside the stages of those names.
        """
        called = {
            "text": self._spent(TEXT),
            "picture": self._spent(PICTURE),
            "encode": self._spent((ENCODE,)),
            "forwards": sum(self.forwards_s()),
            "decode": self._spent((DECODE,)) or self.stages_s.get("decode", 0.0),
        }
        told = {name: self.stages_s.get(name, 0.0) for name in ("load", "fetch", "upload")}
        file_s = self.stages_s.get("file")
        if file_s is None:
            stages_s = sum(self.stages_s.get(name, 0.0) for name in SHARES)  # others run inside or beside these
            file_s = max(0.0, self.seconds - stages_s)
        parts = {**called, **told, "file": file_s}
        return {**parts, "rest": self.seconds - sum(parts.values())}

    def _spent(self, names: tuple[str, ...]) -> float:
        return sum(sum(self.calls_s.get(name, [])) for name in names)


class Watch:
    """Seconds of every call of the modules it follows, on the card's own clock; on the CPU's where there is none."""

    def __init__(self) -> None:
        self.tokens = 0
        """Of the last forward of a video transformer: what it really worked on, not what the request looks like."""
        self._marks: list[tuple[str, Any, Any]] = []
        self._open: dict[str, Any] = {}

    def follow(self, name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, args, kwargs: self._enter(name, args, kwargs), with_kwargs=True)
        module.register_forward_hook(lambda *_: self.end(name))

    def follow_vae(self, vae: Any) -> None:
        """An encode runs from the encoder's first convolution to the one after it, however often it chunks."""
        vae.encoder.conv_in.register_forward_pre_hook(lambda *_: self.begin(ENCODE))
        vae.quant_conv.register_forward_hook(lambda *_: self.end(ENCODE))
        self.follow(DECODE, vae.decoder)

    def take(self) -> dict[str, list[float]]:
        """What was seen since the last time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        calls: dict[str, list[float]] = {}
        for name, begin, end in self._marks:
            calls.setdefault(name, []).append(between(begin, end))
        self._marks.clear()
        return calls

    def begin(self, name: str) -> None:
        """Open a span; one that is open already goes on."""
        self._open.setdefault(name, mark())

    def end(self, name: str) -> None:
        """Close a span. One that never began, as after a failed job, is let go."""
        opened = self._open.pop(name, None)
        if opened is not None:
            self._marks.append((name, opened, mark()))

    def _enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shown = kwargs.get("hidden_states", args[0] if args else None)
        if name in FORWARDS and isinstance(shown, torch.Tensor) and shown.dim() == 5:  # (1, c, T, h, w)
            self.tokens = LatentShape(*shown.shape[2:]).tokens
        self._open.pop(name, None)
        self.begin(name)


@dataclass(frozen=True)
class WatchedParts:
    """Parts whose models are followed from the moment they are loaded, and kept to be looked at."""

    parts: Any
    watch: Watch
    models: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def profile(self) -> Any:
        return self.parts.profile

    def load(self, name: str, device: str = "cpu") -> Any:
        part = self.parts.load(name, device)
        if name in (*FORWARDS, *TEXT, *PICTURE):
            self.watch.follow(name, part)
            self.models[name] = part
        if name == "vae":
            self.watch.follow_vae(part)
        return part


def sample(run: Callable[[], dict[str, float]], watch: Watch) -> Sample:
    """Run one job; `run` returns its stages."""
    watch.take()
    restart_peak()
    started = time.perf_counter()
    stages = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return Sample(seconds, stages, watch.take(), watch.tokens, memory())
