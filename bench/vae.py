"""Encode and decode of the video VAE at 832x480x81: stock and memoised, fp32 and bf16."""

from dataclasses import dataclass
from typing import Any

import torch

from bench.timing import begin_peak, peak_reserved_gib, seconds
from bench.work import TERA, VAE_DECODE, VAE_ENCODE, VAE_ENCODE_MEMOISED
from engine.geometry import VideoShape
from engine.linear8_check import snr_db
from engine.memo_encode import MemoEncoder
from engine.vae import decode_chunks

SHAPE = VideoShape(81, 480, 832)


@dataclass(frozen=True)
class Row:
    name: str
    seconds: float
    tflop_s: float
    peak_reserved_gib: float
    says: str


@torch.inference_mode()
def compare(vae: Any, device: str = "cuda", shape: VideoShape = SHAPE) -> list[Row]:
    """`vae`: AutoencoderKLWan in fp32 on the card."""
    pixels = torch.zeros(1, 3, *shape, device=device)
    generator = torch.Generator(device).manual_seed(3)
    for frame in (0, -1):
        pixels[:, :, frame] = torch.rand(1, 3, shape.height, shape.width, generator=generator, device=device) * 2 - 1
    memo = MemoEncoder(vae)
    stock = vae.encode(pixels).latent_dist.parameters
    equal = torch.equal(memo.encode(pixels).latent_dist.parameters, stock)
    runs = memo.last.stage_runs if memo.last else ()
    rows = [
        _row("encode, stock fp32", lambda: vae.encode(pixels), VAE_ENCODE, ""),
        _row(
            "encode, memoised fp32",
            lambda: memo.encode(pixels),
            VAE_ENCODE_MEMOISED,
            f"equal: {equal}; stage runs {sum(runs)} of {len(runs) * shape.latent().frames}; {'; '.join(memo.notes)}",
        ),
    ]
    latents = torch.randn(1, 16, *shape.latent(), generator=generator, device=device)
    rows.append(_row("decode, stock fp32", lambda: vae.decode(latents), VAE_DECODE, ""))
    wide = torch.cat([chunk.cpu() for chunk in decode_chunks(vae, latents)], dim=2)
    vae.to(torch.bfloat16)
    rows.append(_row("decode, stock bf16", lambda: vae.decode(latents.bfloat16()), VAE_DECODE, ""))
    narrow = torch.cat([chunk.float().cpu() for chunk in decode_chunks(vae, latents)], dim=2)
    rows.append(
        _row(
            "decode, ours bf16, in chunks",
            lambda: [None for _ in decode_chunks(vae, latents)],
            VAE_DECODE,
            f"against fp32: {snr_db(wide, narrow):.1f} dB",
        )
    )
    return rows


def _row(name: str, run: Any, work: float, says: str) -> Row:
    begin_peak()
    spent = seconds(run, repeats=3)
    return Row(name, spent, work / spent / TERA, peak_reserved_gib(), says)
