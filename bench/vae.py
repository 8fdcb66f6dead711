"""The video VAE at 832x480x81: decode lever by lever, encode stock and memoised.

    python -m bench vae         within a run of the benchmark
    python -m bench.vae         alone, with the dearest kernels of the decode in its last form

Weights are random; quality is told against the stock decode in fp32, whose convolutions a card runs in TF32.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.kernels import KernelTime
from bench.kernels import table as kernel_table
from bench.timing import begin_peak, peak_reserved_gib, seconds
from bench.work import TERA, VAE_DECODE, VAE_ENCODE, VAE_ENCODE_MEMOISED
from engine.fast_decode import FastDecoder
from engine.frames import stream_uint8
from engine.geometry import VideoShape
from engine.memo_encode import MemoEncoder
from engine.passes import TORCH, Passes
from engine.vae import decode_chunks, denormalise

SHAPE = VideoShape(81, 480, 832)
PEAK = 2.0  # from black to white in [-1, 1]
# Kernels that only change where channels lie, by parts of their names in cuDNN's and torch's libraries.
CONVERSIONS = ("nchwToNhwc", "nhwcToNchw", "convertTensor", "transpose")
COPIES = ("copy_kernel", "CatArray", "Memcpy DtoD")

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Row:
    name: str
    seconds: float
    first_s: float
    """Of the first run, which compiles kernels and chooses convolutions."""
    tflop_s: float
    peak_reserved_gib: float
    snr_db: float | str = "–"
    psnr_db: float | str = "–"
    """Both against the stock decode in fp32."""
    kernels: int | str = "–"
    conversions: int | str = "–"
    copies: int | str = "–"
    says: str = ""


@dataclass(frozen=True)
class Rung:
    """A way to decode: the whole of it, and where its chunks come from."""

    name: str
    run: Callable[[], Iterator[Any]]
    context: Context = nullcontext


@torch.inference_mode()
def compare(vae: Any, device: str = "cuda", shape: VideoShape = SHAPE) -> list[Row]:
    """`vae`: AutoencoderKLWan in fp32 on `device`, and it stays so."""
    generator = torch.Generator(device).manual_seed(3)
    latents = torch.randn(1, vae.config.z_dim, *shape.latent(), generator=generator, device=device)
    wide = vae.decode(denormalise(vae, latents)).sample.cpu()
    area = shape.frames * shape.height * shape.width / (SHAPE.frames * SHAPE.height * SHAPE.width)
    rows = [_measure(rung, area * VAE_DECODE, wide) for rung in rungs(vae, latents)]
    return [*rows, *_encodes(vae, device, shape, area)]


@torch.inference_mode()
def dearest_kernels(vae: Any, device: str = "cuda", shape: VideoShape = SHAPE) -> list[KernelTime]:
    """Of the decode as a job with 8-bit experts runs it."""
    latents = torch.randn(1, vae.config.z_dim, *shape.latent(), device=device)
    job = _as_a_job(vae, latents)
    _exhaust(job)
    return kernel_table(_kernels(job))


def rungs(vae: Any, latents: Tensor) -> Iterator[Rung]:
    """Each adds one lever to the one before; the last is what a job runs."""
    raw = denormalise(vae, latents)
    yield Rung("decode, stock fp32", lambda: iter([vae.decode(raw).sample]))
    yield _stock_bf16(vae, raw)
    fused = _passes(latents)
    yield _ours("channels last", FastDecoder(vae, torch.bfloat16, TORCH, 1), latents)
    yield _ours("+ fused passes", FastDecoder(vae, torch.bfloat16, fused, 1), latents)
    for chunk in (2, 4):
        decoder = FastDecoder(vae, torch.bfloat16, fused, chunk)
        yield _ours(f"+ {chunk} latent frames a chunk", decoder, latents)
        yield _ours(f"{chunk} a chunk, + cudnn.benchmark", decoder, latents, _choose_by_trial)
    yield _as_a_job(vae, latents)


def _stock_bf16(vae: Any, raw: Tensor) -> Rung:
    narrow = type(vae).from_config(vae.config)
    narrow.load_state_dict(vae.state_dict())
    narrow.to(vae.device, torch.bfloat16).eval().requires_grad_(False)
    return Rung("decode, stock bf16", lambda: iter([narrow.decode(raw.bfloat16()).sample]))


def _ours(name: str, decoder: FastDecoder, latents: Tensor, context: Context = nullcontext) -> Rung:
    return Rung(f"decode, {name}", lambda: decode_chunks(decoder, latents), context)


def _as_a_job(vae: Any, latents: Tensor) -> Rung:
    decoder = FastDecoder(vae, torch.bfloat16, _passes(latents))
    return Rung("decode, as a job: to bytes", lambda: stream_uint8(c[0] for c in decode_chunks(decoder, latents)))


def _measure(rung: Rung, work: float, wide: Tensor) -> Row:
    begin_peak()
    started = time.perf_counter()
    made = _exhaust(rung)
    first = time.perf_counter() - started
    quality = {} if not torch.is_tensor(made[0]) else _quality(wide, torch.cat([chunk.cpu() for chunk in made], dim=2))
    del made
    begin_peak()
    spent = seconds(lambda: _exhaust(rung, keep=False), repeats=3, warm_up=0)
    peak = peak_reserved_gib()
    seen = _kernels(rung)
    return Row(
        rung.name,
        spent,
        first,
        work / spent / TERA,
        peak,
        kernels=sum(calls for _, calls, _ in seen),
        conversions=_calls(seen, CONVERSIONS),
        copies=_calls(seen, COPIES),
        **quality,
    )


def _exhaust(rung: Rung, keep: bool = True) -> list[Any]:
    with rung.context():
        made = [chunk if keep else None for chunk in rung.run()]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return made


def _kernels(rung: Rung) -> list[tuple[str, int, float]]:
    """Kernel, calls, milliseconds of one decode; nothing where there is no card."""
    if not torch.cuda.is_available():
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        _exhaust(rung, keep=False)
    return [(event.key, event.count, event.self_device_time_total / 1000) for event in seen.key_averages()]


def _calls(seen: list[tuple[str, int, float]], parts: tuple[str, ...]) -> int:
    return sum(calls for name, calls, _ in seen if any(part in name for part in parts))


def _quality(wide: Tensor, narrow: Tensor) -> dict[str, float]:
    error = (wide - narrow.float()).square().mean()
    return {
        "snr_db": float(10 * torch.log10(wide.square().mean() / error)),
        "psnr_db": float(10 * torch.log10(PEAK**2 / error)),
    }


def _choose_by_trial() -> AbstractContextManager[Any]:
    """cuDNN tries its convolutions on the first of each shape and keeps the fastest; only within the block."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True)


def _passes(latents: Tensor) -> Passes:
    if not latents.is_cuda:
        return TORCH
    from engine.passes_triton import TRITON

    return TRITON


def _encodes(vae: Any, device: str, shape: VideoShape, area: float) -> Iterator[Row]:
    pixels = torch.zeros(1, 3, *shape, device=device)
    generator = torch.Generator(device).manual_seed(3)
    for frame in (0, -1):
        pixels[:, :, frame] = torch.rand(1, 3, shape.height, shape.width, generator=generator, device=device) * 2 - 1
    memo = MemoEncoder(vae)
    equal = torch.equal(
        memo.encode(pixels).latent_dist.parameters,
        vae.encode(pixels).latent_dist.parameters,
    )
    runs = memo.last.stage_runs if memo.last else ()
    says = f"equal: {equal}; stage runs {sum(runs)} of {len(runs) * shape.latent().frames}; {'; '.join(memo.notes)}"
    yield _encode_row("encode, stock fp32", lambda: vae.encode(pixels), area * VAE_ENCODE, "")
    yield _encode_row("encode, memoised fp32", lambda: memo.encode(pixels), area * VAE_ENCODE_MEMOISED, says)
    one = pixels[:, :, :1]
    yield _encode_row("encode, one frame", lambda: vae.encode(one), area * VAE_ENCODE / shape.latent().frames, "")


def _encode_row(name: str, run: Callable[[], object], work: float, says: str) -> Row:
    begin_peak()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    first = time.perf_counter() - started
    spent = seconds(run, repeats=3, warm_up=0)
    return Row(name, spent, first, work / spent / TERA, peak_reserved_gib(), says=says)


def main() -> None:
    from bench.jobs import CAP_GIB, GIB, located
    from bench.ours import CardParts
    from bench.table import rows

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_GIB * GIB / total))
    vae = CardParts(*located("svi_endframe", Path("weights/tiny"))).load("vae", "cuda")
    for lines in (compare(vae), dearest_kernels(vae)):
        body = [asdict(line) for line in lines]
        print(rows(list(body[0]), [list(line.values()) for line in body]), flush=True)


if __name__ == "__main__":
    main()
