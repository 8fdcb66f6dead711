"""Encoding a video that is mostly the same frame, without computing the same thing twice. Bit-exact.

Why. The condition of image-to-video is [start, grey, grey, ..., (end)]: of 81 frames 79 or 80 are constant. The stock
encoder computes all of them in float32, 164 TFLOP at 832x480x81. This one computes 52 (start only) or 60 (start and
end) and returns the same bits.

How. Wan's encoder is causal. It takes one frame, then four at a time, and every convolution keeps the last two frames
it saw. Cut into stages (the first convolution, each block, the middle, the head), a stage is a function:

    (input chunk, kept frames) -> (output chunk, kept frames)

If a stage is given the very chunk it was given last time, and its last run left the kept frames bit for bit as it
found them, then another run would compute the same numbers: it returns the chunk of its last run instead. Handing on
that same chunk is what lets the next stage notice. A constant stretch enters the first stage, and each stage falls
silent a chunk or so after the one before; the wide early stages run 3 to 7 times instead of 21.

No table says when a stage may rest. It is seen from the kept frames on every run, because it depends on the picture
too: a grey start picture lets the stages rest sooner, and a table learned from that one would be wrong for the next.

What it assumes is that a kernel given the same bits returns the same bits. A CPU does; on a card it depends on the
convolution chosen. So the first encode of each shape can be compared with the stock one, and where they differ the
stock encoder is used from then on, and log and `notes` say so. Nothing here changes the VAE.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanEncoder3d,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

log = logging.getLogger(__name__)

CHUNK = 4  # pixel frames a chunk after the first one, which is 1 (AutoencoderKLWan._encode)
KEPT = 2  # frames that a causal convolution of length 3 looks back (CACHE_T in autoencoder_kl_wan)


class Kept:
    """The frames that the convolutions of one stage keep, by index as diffusers' blocks read and write them.

    Each is compared when it is replaced, so that no stage holds the old and the new ones at once.
    """

    def __init__(self, convolutions: int) -> None:
        self.has_changed = False
        """Since somebody last set it to False."""
        self._frames: list[Tensor | None] = [None] * convolutions

    def __getitem__(self, index: int) -> Tensor | None:
        return self._frames[index]

    def __setitem__(self, index: int, frames: Tensor) -> None:
        self.has_changed = self.has_changed or not _same(self._frames[index], frames)
        self._frames[index] = frames


@dataclass(frozen=True)
class Encoded:
    """What the last encode did. `stage_runs`: runs of each stage in the encoder's order, empty for a stock encode."""

    chunks: int
    stage_runs: tuple[int, ...]
    reason: str
    """Why the stock encoder was used; '' if it was not."""


@dataclass(eq=False)
class Chunk:
    """What passes from stage to stage. Two chunks are the same if they are this very object."""

    frames: Tensor | None
    """(1, c, f, h, w); None once the stage that takes it will not run on it again, so that it holds no memory."""
    comes_again: bool
    """Whether it may be handed on a second time: it is the input's, or its maker has settled on it."""


@dataclass
class Stage:
    """One piece of the encoder during one encode. `kept` is its share of the encoder's feature cache."""

    run: Callable[[Tensor, Kept], Tensor]
    kept: Kept
    runs: int = 0
    given: Chunk | None = None
    made: Chunk | None = None
    """Set once settled: the last run left `kept` as it found it, so the same chunk would give this again."""

    def __call__(self, chunk: Chunk) -> Chunk:
        if chunk is self.given and self.made is not None:
            return self.made
        assert chunk.frames is not None, "a stage that settled on a chunk does not run on it again"
        if self.made is not None:
            self.made.frames = None  # another chunk came, so this one will not be handed on again
        self.given, self.made = chunk, None
        self.kept.has_changed = False
        made = Chunk(self.run(chunk.frames, self.kept), comes_again=False)
        self.runs += 1
        if chunk.comes_again and not self.kept.has_changed:
            self.made = made
            made.comes_again = True
        if self.made is not None or not chunk.comes_again:
            chunk.frames = None
        return made


@dataclass
class MemoEncoder:
    """Stands in for `vae.encode`. With `verify`, the first encode of each shape is compared with the stock one."""

    vae: Any
    verify: bool = True
    notes: list[str] = field(default_factory=list)
    last: Encoded | None = None
    _trusted: dict[tuple[Any, ...], bool] = field(default_factory=dict)

    def encode(self, pixels: Tensor) -> AutoencoderKLOutput:
        """Encode pixels (1, 3, F, H, W) in [-1, 1], F = 4k + 1; equal to `vae.encode(pixels)` bit for bit."""
        reason = _obstacle(self.vae, pixels)
        if reason:
            return self._stock(pixels, reason)
        chunks = list(_chunks(pixels))
        pattern = tuple(a is b for a, b in pairwise(chunks))
        key = (tuple(pixels.shape), pixels.dtype, pixels.device, pattern)
        if self._trusted.get(key, True) is False:
            return self._stock(pixels, "its memoised encode was not equal before")
        moments, stages = _encode(self.vae, chunks)
        runs = tuple(stage.runs for stage in stages)
        del stages  # what they keep would lie on the card beside the stock encode
        if self.verify and key not in self._trusted:
            stock = self.vae.encode(pixels)
            self._trusted[key] = torch.equal(stock.latent_dist.parameters, moments)
            if not self._trusted[key]:
                self.notes.append(f"memoised VAE encode is off for {tuple(pixels.shape)}: not equal to the stock one")
                log.warning("%s", self.notes[-1])
                self.last = Encoded((pixels.shape[2] - 1) // CHUNK + 1, (), "not equal to the stock encode")
                return stock
        self.last = Encoded((pixels.shape[2] - 1) // CHUNK + 1, runs, "")
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    def _stock(self, pixels: Tensor, reason: str) -> AutoencoderKLOutput:
        self.last = Encoded((pixels.shape[2] - 1) // CHUNK + 1, (), reason)
        output: AutoencoderKLOutput = self.vae.encode(pixels)
        return output


def _obstacle(vae: Any, pixels: Tensor) -> str:
    """Why this VAE or input needs the stock encoder; '' if it does not."""
    if not isinstance(vae.encoder, WanEncoder3d) or vae.config.is_residual or vae.config.attn_scales:
        return "the encoder is not the one that this module takes apart"
    if vae.config.patch_size is not None:
        return "the VAE folds pixels into patches first"
    if vae.use_tiling:
        return "tiling is on"
    if pixels.shape[0] != 1:
        return "more than one video at a time"
    if (pixels.shape[2] - 1) % CHUNK:
        return "a number of frames that is not 4k + 1"
    return ""


def _chunks(pixels: Tensor) -> Iterator[Chunk]:
    """Cut the video as the encoder takes it; frames equal to those before are the same chunk again."""
    frames = pixels[:, :, :1]
    chunk = Chunk(frames, comes_again=True)
    yield chunk
    for start in range(1, pixels.shape[2], CHUNK):
        previous, frames = frames, pixels[:, :, start : start + CHUNK]
        if not torch.equal(frames, previous):
            chunk = Chunk(frames, comes_again=True)
        yield chunk


def _encode(vae: Any, chunks: list[Chunk]) -> tuple[Tensor, list[Stage]]:
    """The encoder over all chunks: the moments (1, 2 * z, T, h, w) as `vae._encode` gives them, and its stages."""
    stages = _stages(vae.encoder)
    latents = []
    for chunk in chunks:
        for stage in stages:
            chunk = stage(chunk)
        assert chunk.frames is not None, "nothing follows the last stage, so nothing lets its chunk go"
        latents.append(chunk.frames)
    return vae.quant_conv(torch.cat(latents, dim=2)), stages


def _stages(encoder: WanEncoder3d) -> list[Stage]:
    stages = [_stage(encoder.conv_in, lambda x, kept: _causal(encoder.conv_in, x, kept))]
    stages += [_stage(block, _block_runner(block)) for block in encoder.down_blocks]
    stages.append(_stage(encoder.mid_block, _block_runner(encoder.mid_block)))
    stages.append(_stage(encoder.conv_out, lambda x, kept: _head(encoder, x, kept)))
    return stages


def _stage(module: nn.Module, run: Callable[[Tensor, Kept], Tensor]) -> Stage:
    convolutions = sum(isinstance(child, WanCausalConv3d) for child in module.modules())
    return Stage(run, Kept(convolutions))


def _block_runner(block: nn.Module) -> Callable[[Tensor, Kept], Tensor]:
    return lambda x, kept: block(x, feat_cache=kept, feat_idx=[0])


def _head(encoder: WanEncoder3d, x: Tensor, kept: Kept) -> Tensor:
    return _causal(encoder.conv_out, encoder.nonlinearity(encoder.norm_out(x)), kept)


def _causal(convolution: WanCausalConv3d, x: Tensor, kept: Kept) -> Tensor:
    """One convolution with its two kept frames, as WanEncoder3d.forward does for its first and last."""
    before = kept[0]
    keep = x[:, :, -KEPT:].clone()
    if before is not None and keep.shape[2] < KEPT:
        keep = torch.cat([before[:, :, -1:], keep], dim=2)
    out: Tensor = convolution(x, before)
    kept[0] = keep
    return out


def _same(before: Tensor | None, after: Tensor) -> bool:
    return before is not None and torch.equal(before, after)
