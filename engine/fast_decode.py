"""Wan's video decoder arranged for a card: the function of diffusers' WanDecoder3d, in a few passes over memory.

Why. The stock decoder spends most of its time moving data, not multiplying: every convolution pads, concatenates and
clones its input, adds its bias in a pass of its own and is handed channels first, which the tensor cores take only
after a conversion; every norm is five passes in fp32. A bf16 decode at 832x480x81 moves 2.4 TB that way.

How. Activations are (frames, height, width, channels) from the first convolution to the last. What a convolution
reads is written once, straight behind the two frames kept of the chunk before; the border in space is the
convolution's own. Bias, norm, SiLU and the residual sum are fused (engine.passes). Several latent frames may be
decoded at a time: the decoder is causal, so a chunk's length changes how sums are cut and nothing else.

The first latent frame is always a chunk of its own. It becomes one frame, every other one four, because the
convolutions that double the frames (WanResample, its mark 'Rep') leave it out and start on zeros after it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
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
from engine.passes import TORCH, Passes, norm

LOOK_BACK = 2  # frames that a causal convolution of length 3 sees before its own
MOST_STACKED_CHANNELS = 96  # of a convolution that is run as a StackedConv; measured, see there
COLOURS = 3
WRITTEN_CHANNELS = 8  # the tensor cores write channels in eights; three would take the slow way
MOST_LATENTS_A_CHUNK = 2  # on an H200 at 480x832 four are 1 % faster and take 2.3 GiB more
# What one chunk may take beside the frames kept for the next (1.8 GB at 832x480 in bf16). Both together are well below
# what a profile's plan sets aside for an 8-bit forward, and the decode comes after the last one.
WORK_BYTES = 4_500_000_000
# Most that is alive at a time, in tensors as large as the last activation: around a stacked convolution, what the block
# began with (one), its input behind the frames kept (one and a half), that stacked (three) and its output (one).
WIDEST = 6.5


@dataclass(frozen=True, eq=False)
class CausalConv:
    """A convolution over frames that looks back only. `weight`: (out, in, 3, k, k), channels last."""

    weight: Tensor
    bias: Tensor

    def __call__(self, padded: Tensor, *, add_bias: bool) -> Tensor:
        """(LOOK_BACK + f, h, w, in) -> (f, h, w, out)."""
        border = self.weight.shape[-1] // 2
        video = padded.permute(3, 0, 1, 2)[None]  # (1, c, f, h, w), and still channels last in memory
        bias = self.bias if add_bias else None
        out = functional.conv3d(video, self.weight, bias, padding=(0, border, border))
        return out[0].permute(1, 2, 3, 0)


@dataclass(frozen=True, eq=False)
class StackedConv(CausalConv):
    """The same function over single frames, each with the two before it stacked in its channels.

    With 96 channels at 480x832 the libraries' convolution over frames reaches 296 TFLOP/s on an H200 and this one 528,
    for one more pass over memory; with 192 and more the convolution over frames is as fast. `weight`: (out, 3 * in,
    k, k), channels last.
    """

    def __call__(self, padded: Tensor, *, add_bias: bool) -> Tensor:
        """(LOOK_BACK + f, h, w, in) -> (f, h, w, out)."""
        frames = padded.shape[0] - LOOK_BACK
        stacked = torch.cat([padded[i : i + frames] for i in range(LOOK_BACK + 1)], dim=-1)
        bias = self.bias if add_bias else None
        out = functional.conv2d(stacked.permute(0, 3, 1, 2), self.weight, bias, padding=self.weight.shape[-1] // 2)
        return out.permute(0, 2, 3, 1)


@dataclass(eq=False)
class Past:
    """What the convolutions of one decode remember of the chunks before. A new video takes a new one."""

    has_begun: bool = False
    _kept: dict[CausalConv, Tensor] = field(default_factory=dict)

    def begin(self, conv: CausalConv, x: Tensor, channels: int) -> Tensor:
        """Room for the input of `conv`: (LOOK_BACK + f, h, w, channels), where f, h, w are those of `x`.

        The first frames are those kept, or zeros; the rest is to be written.
        """
        f, h, w, _ = x.shape
        padded = x.new_empty(LOOK_BACK + f, h, w, channels)
        if conv in self._kept:
            padded[:LOOK_BACK] = self._kept[conv]
        else:
            padded[:LOOK_BACK] = 0
        return padded

    def keep(self, conv: CausalConv, padded: Tensor) -> Tensor:
        """Remember the last frames of what `begin` gave and somebody has filled; returns it."""
        if conv in self._kept:
            self._kept[conv].copy_(padded[-LOOK_BACK:])
        else:
            self._kept[conv] = padded[-LOOK_BACK:].clone()
        return padded

    def convolve(self, conv: CausalConv, x: Tensor) -> Tensor:
        """`conv` on x (f, h, w, c) as it is, with its bias."""
        padded = self.begin(conv, x, x.shape[-1])
        padded[LOOK_BACK:] = x
        return conv(self.keep(conv, padded), add_bias=True)


@dataclass(frozen=True, eq=False)
class Residual:
    """WanResidualBlock."""

    gammas: tuple[Tensor, Tensor]
    convs: tuple[CausalConv, CausalConv]
    shortcut: tuple[Tensor, Tensor] | None
    """Weight (out, in) and bias, where the number of channels changes."""

    def __call__(self, x: Tensor, past: Past, passes: Passes) -> Tensor:
        first, second = self.convs
        y = self._norm_conv(first, self.gammas[0], None, x, past, passes)
        y = self._norm_conv(second, self.gammas[1], first.bias, y, past, passes)
        identity = x if self.shortcut is None else functional.linear(x, *self.shortcut)
        return passes.add(y, second.bias, identity)

    @staticmethod
    def _norm_conv(
        conv: CausalConv, gamma: Tensor, bias: Tensor | None, x: Tensor, past: Past, passes: Passes
    ) -> Tensor:
        """`bias`: of the convolution that made x, still to be added. This one's is left to the next pass."""
        padded = past.begin(conv, x, x.shape[-1])
        passes.norm_silu(x, bias, gamma, padded[LOOK_BACK:])
        return conv(past.keep(conv, padded), add_bias=False)


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
    """WanResample: twice the frames (but for the first) where `time` is given, then twice the size."""

    time: CausalConv | None
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor, past: Past, passes: Passes) -> Tensor:
        if self.time is not None and past.has_begun:
            f, h, w, c = x.shape
            pairs = past.convolve(self.time, x).reshape(f, h, w, 2, c)
            x = pairs.permute(0, 3, 1, 2, 4).reshape(2 * f, h, w, c)
        large = passes.double_size(x).permute(0, 3, 1, 2)  # (f, c, 2h, 2w), channels last in memory
        return functional.conv2d(large, self.weight, self.bias, padding=1).permute(0, 2, 3, 1)


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
        self._stages = [_stage(module, dtype) for module in _modules(decoder)]
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
        padded = past.begin(self._last, x, x.shape[-1])
        self.passes.norm_silu(x, None, self._last_gamma, padded[LOOK_BACK:])
        pixels = self._last(past.keep(self._last, padded), add_bias=True)[..., :COLOURS]
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


def _stage(module: Any, dtype: torch.dtype) -> Stage:
    if isinstance(module, WanResidualBlock):
        return Residual(
            (_gamma(module.norm1, dtype), _gamma(module.norm2, dtype)),
            (_causal_conv(module.conv1, dtype), _causal_conv(module.conv2, dtype)),
            _linear(module.conv_shortcut, dtype) if isinstance(module.conv_shortcut, WanCausalConv3d) else None,
        )
    if isinstance(module, WanAttentionBlock):
        return Attention(_gamma(module.norm, dtype), _linear(module.to_qkv, dtype), _linear(module.proj, dtype))
    assert module.mode in ("upsample2d", "upsample3d"), "a decoder makes nothing smaller"
    _, conv = module.resample
    time = _causal_conv(module.time_conv, dtype) if module.mode == "upsample3d" else None
    weight = conv.weight.detach().to(dtype, copy=True, memory_format=torch.channels_last)
    return Upsample(time, weight, conv.bias.detach().to(dtype, copy=True))


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
