"""Wan's causal video VAE: pixels to normalised latents and back, a chunk of frames at a time.

Everywhere else in the engine a latent is *normalised*: fp32, each channel shifted and scaled by the VAE's own
statistics. This module alone knows the raw ones. Source: diffusers 0.42.1, AutoencoderKLWan and
WanImageToVideoPipeline.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor

from engine.fast_decode import FastDecoder
from engine.geometry import frames_advice, is_legal_frames
from engine.passage import to_device


def encode_norm(vae: Any, pixels: Tensor, encode: Callable[[Tensor], Any] | None = None) -> Tensor:
    """Encode a video to the mode of its posterior, normalised. `encode` stands in for `vae.encode`.

    `pixels`: (1, 3, F, H, W) in [-1, 1]. Returns (1, z, (F - 1) / 4 + 1, H / 8, W / 8) fp32 on the VAE's
    device.

    Raises:
        ValueError: F is not 4k + 1. The stock VAE would drop the last frames without a word.
    """
    frames = pixels.shape[2]
    if not is_legal_frames(frames):
        raise ValueError(f"{frames} frames: {frames_advice(frames)}")
    try:
        posterior = (encode or vae.encode)(pixels.to(device=vae.device, dtype=vae.dtype)).latent_dist
    finally:
        vae.clear_cache()  # a failure in the middle would leave the features of half a video on the card
    return normalise(vae, posterior.mode())


def normalise(vae: Any, raw: Tensor) -> Tensor:
    """Raw latents (1, z, T, h, w) of any dtype to normalised fp32 ones."""
    mean, inverse_std = _statistics(vae, raw.device)
    return (raw.float() - mean) * inverse_std


def denormalise(vae: Any, latents: Tensor) -> Tensor:
    """Normalised latents (1, z, T, h, w) to the raw ones that `vae.decode` takes, fp32."""
    mean, inverse_std = _statistics(vae, latents.device)
    return latents.float() / inverse_std + mean


def decode_chunks(vae: Any, latents: Tensor) -> Iterator[Tensor]:
    """Decode normalised latents (1, z, T, h, w) one latent frame at a time. `vae`: AutoencoderKLWan or FastDecoder.

    Yields (1, 3, f, H, W) in [-1, 1], of the VAE's dtype: f is 1 for the first chunk and 4 for each after it.
    The chunks of an AutoencoderKLWan put together equal `vae.decode(denormalise(vae, latents)).sample` bit for bit;
    those of a FastDecoder equal it but for the rounding of its sums. The causal features live in this iterator, not
    in the VAE: leaving it early leaves nothing behind. Tiles are engine.tiled_decode's; the VAE's own are not used.
    """
    yield from _decode_raw(vae, _raw(vae, latents))


def decode_end_single(vae: Any, latents: Tensor) -> Iterator[Tensor]:
    """Decode latents whose last frame was made from a single picture: that one alone, with fresh features.

    `latents`: (1, z, T, h, w), normalised. Yields chunks as `decode_chunks` does, of 4T - 6 frames in all;
    the last chunk is 1 frame. In the causal stream a first-frame latent at the end would come out grey.

    Raises:
        ValueError: T is below 2.
    """
    if latents.shape[2] < 2:
        raise ValueError(f"{latents.shape[2]} latent frames: a single-picture end needs at least 2")
    raw = _raw(vae, latents)  # all at once: going to the card waits for all that it does, here for nothing
    yield from _decode_raw(vae, raw[:, :, :-1])
    yield from _decode_raw(vae, raw[:, :, -1:])


def _raw(vae: Any, latents: Tensor) -> Tensor:
    return denormalise(vae, latents.to(vae.device)).to(vae.dtype)


def _decode_raw(vae: Any, raw: Tensor) -> Iterator[Tensor]:
    if isinstance(vae, FastDecoder):
        yield from vae.decode(raw)
        return
    features = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    hidden = vae.post_quant_conv(raw)
    for i in range(hidden.shape[2]):
        chunk = vae.decoder(
            hidden[:, :, i : i + 1], feat_cache=features, feat_idx=[0], first_chunk=i == 0
        )  # (1, 3, 1 or 4, H, W)
        if vae.config.patch_size is not None:
            chunk = unpatchify(chunk, patch_size=vae.config.patch_size)
        yield chunk.clamp(-1.0, 1.0)


def _statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation, each (1, z, 1, 1, 1) fp32; inverted as the stock pipeline does it."""
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, dtype=torch.float32).view(shape)
    std = torch.tensor(vae.config.latents_std, dtype=torch.float32).view(shape)
    return to_device(mean, device), to_device(1.0 / std, device)
