"""Wan's video decoder arranged for a card: the function of diffusers' WanDecoder3d, in a few passes over memory.

Why. The stock decoder spends most of its time moving data, not multiplying: every convolution pads, concatenates and
clones its input, adds its bias in a pass of its own and is handed channels first, which the tensor cores take only
after a conversion; every norm is five passes in fp32. A bf16 decode at 832x480x81 moves 2.4 TB that way.

How. Activations are (frames, height, width, channels) from the first convolution to the last. Each convolution makes
the room that it reads, and the pass before writes its results straight to their places there, with the two frames
kept of the chunk before; the border in space is the convolution's own. Bias, norm, SiLU and the residual sum are fused
(engine.passes). Several latent frames may be decoded at a time: the decoder is causal, so a chunk's length changes how
sums are cut and nothing else.

The first latent frame is always a chunk of its own. It becomes one frame, every other one four, because the
convolutions that double the frames (WanResample, its mark 'Rep') leave it out and start on zeros after it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanDecoder3d,
    WanResidualBlock,
    WanRMS_norm,
)
from torch import Tensor, nn
from torch.nn import functional

from engine.geometry import VAE_STRIDE_S, VAE_STRIDE_T
from engine.passes import LOOK_BACK, MOST_STACKED_CHANNELS, TORCH, Passes, norm, place

COLOURS = 3
WRITTEN_CHANNELS = 8  # the tensor cores write channels in eights; three would take the slow way
MOST_LATENTS_A_CHUNK = 2  # on an H200 at 480x832 four are 1 % faster and take 2.3 GiB more
# What one chunk may take beside the frames kept for the next (1.8 GB at 832x480 in bf16). Both together are well below
# what a profile's plan sets aside for an 8-bit forward, and the decode comes after the last one.
WORK_BYTES = 4_500_000_000
# Most that is alive at a time, in tensors as large as the last activation. Around a stacked convolution: what the block
# began with (one), what is read (three), and what was made of it or, before, what it was made of (one).
WIDEST = 5


@dataclass(frozen=True, eq=False)
class CausalConv:
    """A convolution over frames that looks back only. `weight`: (out, in, 3, k, k), channels last."""

    weight: Tensor
    bias: Tensor

    def room(self, x: Tensor) -> Tensor:
        """What it reads of frames like x (f, h, w, in), to be written: (LOOK_BACK + f, h, w, in)."""
        f, h, w, c = x.shape
        return x.new_empty(LOOK_BACK + f, h, w, c)

    def __call__(self, room: Tensor, *, add_bias: bool) -> Tensor:
        """(LOOK_BACK + f, h, w, in) -> (f, h, w, out)."""
        border = self.weight.shape[-1] // 2
        video = room.permute(3, 0, 1, 2)[None]  # (1, c, f, h, w), and still channels last in memory
        bias = self.bias if add_bias else None
        out = functional.conv3d(video, self.weight, bias, padding=(0, border, border))
        return out[0].permute(1, 2, 3, 0)


@dataclass(frozen=True, eq=False)
class StackedConv(CausalConv):
    """The same function over single frames, each with the two before it stacked in its channels.

    With 96 channels at 480x832 the libraries' convolution over frames reaches 296 TFLOP/s on an H200 and this one 528;
    what it reads is written three times for that. With 192 and more the convolution over frames is as fast. `weight`:
    (out, 3 * in, k, k), channels last.
    """

    def room(self, x: Tensor) -> Tensor:
        """What it reads of frames like x (f, h, w, in), to be written: (f, h, w, 3 * in), the oldest frame first."""
        f, h, w, c = x.shape
        return x.new_empty(f, h, w, (LOOK_BACK + 1) * c)

    def __call__(self, room: Tensor, *, add_bias: bool) -> Tensor:
        """(f, h, w, 3 * in) -> (f, h, w, out)."""
        bias = self.bias if add_bias else None
        out = functional.conv2d(room.permute(0, 3, 1, 2), self.weight, bias, padding=self.weight.shape[-1] // 2)
        return out.permute(0, 2, 3, 1)


@dataclass(eq=False)
class Past:
    """What the convolutions of one decode remember of the chunks before. A new video takes a new one."""

    has_begun: bool = False
    _kept: dict[CausalConv, Tensor] = field(default_factory=dict)

    def kept(self, conv: CausalConv, x: Tensor) -> Tensor:
        """The last frames that `conv` was given before x (f, h, w, c), or zeros: (LOOK_BACK, h, w, c).

        Who fills its room overwrites them with the last ones there, for the next chunk.
        """
        if conv not in self._kept:
            self._kept[conv] = x.new_zeros(LOOK_BACK, *x.shape[1:])
        return self._kept[conv]

    def convolve(self, conv: CausalConv, x: Tensor) -> Tensor:
        """`conv` on x (f, h, w, c) as it is, with its bias."""
        room = conv.room(x)
        place(x, self.kept(conv, x), room)
        return conv(room, add_bias=True)

    def normed(self, conv: CausalConv, x: Tensor, bias: Tensor | None, gamma: Tensor, passes: Passes) -> Tensor:
        """What `conv` reads of x (f, h, w, c) after norm and SiLU. `bias`: of what made x, if still to be added."""
        room = conv.room(x)
        passes.norm_silu(x, bias, gamma, self.kept(conv, x), room)
        return room


@dataclass(frozen=True, eq=False)
class Residual:
    """WanResidualBlock."""

    gammas: tuple[Tensor, Tensor]
    convs: tuple[CausalConv, CausalConv]
    shortcut: tuple[Tensor, Tensor] | None
    """Weight (out, in) and bias, where the number of channels changes."""
    missing: Tensor | None
    """What is still to be added to each pixel of x. The norm adds it; for what passes by, the last bias holds it."""

    def __call__(self, x: Tensor, past: Past, passes: Passes) -> Tensor:
        first, second = self.convs
        y = first(past.normed(first, x, self.missing, self.gammas[0], passes), add_bias=False)
        room = past.normed(second, y, first.bias, self.gammas[1], passes)
        del y  # has been read, and the second convolution needs its memory
        y = second(room, add_bias=False)
        identity = x if self.shortcut is None else functional.linear(x, *self.shortcut)
        return passes.add(y, second.bias, identity)


@dataclass(frozen=True, eq=False)
class Attention:
    """WanAttentionBlock: each frame attends to itself, one head."""

    gamma: Tensor
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]

    def __call__(self, x: Tensor, _past: Past, _passes: Passes) -> Tensor:
        f, h, w, c = x.shape
        qkv = functional.linear(norm(x, self.gamma), *self.qkv).view(f, 1, h * w, 3 * c)
        query, key, value = qkv.chunk(3, dim=-1)
        seen = functional.scaled_dot_product_attention(query, key, value).view(f, h, w, c)
        return functional.linear(seen, *self.out) + x


@dataclass(frozen=True, eq=False)
class Upsample:
    """WanResample: twice the frames (but for the first) where `time` is given, then twice the size.

    Its last bias is left to the Residual after it: here it would be a pass over memory of its own.
    """

    time: CausalConv | None
    weight: Tensor

    def __call__(self, x: Tensor, past: Past, passes: Passes) -> Tensor:
        if self.time is not None and past.has_begun:
            f, h, w, c = x.shape
            pairs = past.convolve(self.time, x).reshape(f, h, w, 2, c)
            x = pairs.permute(0, 3, 1, 2, 4).reshape(2 * f, h, w, c)
        large = passes.double_size(x).permute(0, 3, 1, 2)  # (f, c, 2h, 2w), channels last in memory
        return functional.conv2d(large, self.weight, padding=1).permute(0, 2, 3, 1)


class FastDecoder:
    """The second half of an AutoencoderKLWan, from weights of its own in `dtype`. It keeps nothing of a video."""

    def __init__(
        self,
        vae: Any,
        dtype: torch.dtype,
        passes: Passes = TORCH,
        latents_a_chunk: int | None = None,
    ) -> None:
        """`latents_a_chunk`: latent frames computed at a time; None: as many as `WORK_BYTES` hold.

        Raises:
            ValueError: it is not the decoder that this module arranges: another class, or folded pixels.
        """
        decoder = vae.decoder
        if not isinstance(decoder, WanDecoder3d) or vae.config.is_residual or vae.config.patch_size is not None:
            raise ValueError("not a decoder of the Wan2.1 VAE")
        self.config = vae.config
        self.device: torch.device = vae.device
        self.dtype = dtype
        self.passes = passes
        self.latents_a_chunk = latents_a_chunk
        self._enter = _linear(vae.post_quant_conv, dtype)
        self._first = _causal_conv(decoder.conv_in, dtype)
        self._stages = list(_stages(decoder, dtype))
        self._last_gamma = _gamma(decoder.norm_out, dtype)
        self._last = _causal_conv(decoder.conv_out, dtype, WRITTEN_CHANNELS)

    def decode(self, raw: Tensor) -> Iterator[Tensor]:
        """Decode raw latents (1, z, T, h, w) in `dtype`, as `vae.decode` takes them.

        Yields (1, 3, f, H, W) in [-1, 1] of `dtype`: f is 1 for the first latent frame and 4 for each after it.
        """
        past = Past()
        latents = functional.linear(raw[0].permute(1, 2, 3, 0), *self._enter)  # (T, h, w, z)
        yield self._frames(latents[:1], past)
        past.has_begun = True
        if latents.shape[0] > 1:
            for chunk in latents[1:].split(self.latents_a_chunk or self._latents_that_fit(latents)):
                yield from self._frames(chunk, past).split(VAE_STRIDE_T, dim=2)

    def _latents_that_fit(self, latents: Tensor) -> int:
        _, height, width, _ = latents.shape
        pixels = VAE_STRIDE_T * height * width * VAE_STRIDE_S**2
        widest_bytes = WIDEST * pixels * self._last_gamma.numel() * self.dtype.itemsize
        return max(1, min(MOST_LATENTS_A_CHUNK, int(WORK_BYTES / widest_bytes)))

    def _frames(self, latents: Tensor, past: Past) -> Tensor:
        x = past.convolve(self._first, latents)
        for stage in self._stages:
            x = stage(x, past, self.passes)
        room = past.normed(self._last, x, None, self._last_gamma, self.passes)
        pixels = self._last(room, add_bias=True)[..., :COLOURS]
        return pixels.permute(3, 0, 1, 2)[None].clamp(-1.0, 1.0)


def channels(vae: Any) -> set[int]:
    """How many channels a pixel has where the passes run on it."""
    found = {module.gamma.numel() for module in vae.decoder.modules() if isinstance(module, WanRMS_norm)}
    return {int(count) for count in found}


Stage = Residual | Attention | Upsample


def _modules(decoder: Any) -> Iterator[nn.Module]:
    """What stands between the first and the last convolution, in the order of its running."""
    middle = decoder.mid_block
    yield middle.resnets[0]
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        yield from (attention, resnet)
    for block in decoder.up_blocks:
        yield from block.resnets
        yield from block.upsamplers or ()


def _stages(decoder: Any, dtype: torch.dtype) -> Iterator[Stage]:
    missing = None
    for module in _modules(decoder):
        if isinstance(module, WanResidualBlock):
            yield _residual(module, dtype, missing)
            missing = None
            continue
        assert missing is None, "a block comes after what makes larger"
        if isinstance(module, WanAttentionBlock):
            yield Attention(_gamma(module.norm, dtype), _linear(module.to_qkv, dtype), _linear(module.proj, dtype))
        else:
            stage, missing = _upsample(module, dtype)
            yield stage


def _residual(module: Any, dtype: torch.dtype, missing: Tensor | None) -> Residual:
    first, second = (_causal_conv(conv, dtype) for conv in (module.conv1, module.conv2))
    shortcut = _linear(module.conv_shortcut, dtype) if isinstance(module.conv_shortcut, WanCausalConv3d) else None
    if missing is not None:
        passes_by = missing if shortcut is None else functional.linear(missing, shortcut[0])
        second = replace(second, bias=second.bias + passes_by)
    return Residual((_gamma(module.norm1, dtype), _gamma(module.norm2, dtype)), (first, second), shortcut, missing)


def _upsample(module: Any, dtype: torch.dtype) -> tuple[Upsample, Tensor]:
    """And the bias that it does not add."""
    assert module.mode in ("upsample2d", "upsample3d"), "a decoder makes nothing smaller"
    _, conv = module.resample
    time = _causal_conv(module.time_conv, dtype) if module.mode == "upsample3d" else None
    weight = conv.weight.detach().to(dtype, copy=True, memory_format=torch.channels_last)
    return Upsample(time, weight), conv.bias.detach().to(dtype, copy=True)


def _causal_conv(conv: Any, dtype: torch.dtype, multiple: int = 1) -> CausalConv:
    """With zeros for further output channels, up to a `multiple`."""
    more = -conv.out_channels % multiple
    weight = functional.pad(conv.weight.detach().to(dtype), (0, 0) * 4 + (0, more))
    bias = functional.pad(conv.bias.detach().to(dtype), (0, more)).clone()
    _, inputs, frames, *_ = weight.shape
    if frames == LOOK_BACK + 1 and inputs == conv.out_channels and inputs <= MOST_STACKED_CHANNELS:
        stacked = weight.transpose(1, 2).flatten(1, 2)  # (out, 3 * in, k, k): the oldest frame's channels first
        return StackedConv(stacked.clone(memory_format=torch.channels_last), bias)
    return CausalConv(weight.clone(memory_format=torch.channels_last_3d), bias)


def _linear(conv: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A convolution over single pixels as weight (out, in) and bias (out,)."""
    return (conv.weight.detach().flatten(1).to(dtype, copy=True), conv.bias.detach().to(dtype, copy=True))


def _gamma(module: Any, dtype: torch.dtype) -> Tensor:
    gamma: Tensor = module.gamma
    return gamma.detach().flatten().to(dtype, copy=True)
