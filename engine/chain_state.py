"""What a chain of clips hands to the job that goes on with it: its last latents, and where its seeds stand.

Little-endian: magic, version, motion latents, channels, height, width, next clip, base seed, SHA-256 of the
anchor's pixels, CRC-32 of all the rest; then the latents as fp32. At 832x480 400 kB, as base64 532 kB.
"""

import base64
import binascii
import hashlib
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from engine.geometry import SIZE_MULTIPLE, VAE_STRIDE_S, LatentShape
from schemas.errors import InvalidInput, Problem
from schemas.fields import MAX_SEED

if TYPE_CHECKING:  # a request's state is looked at before torch is loaded
    from torch import Tensor

MAGIC = b"SVIS"
VERSION = 1
MAX_INDEX = 2**31  # of a clip: seeds of the clips after it fit torch, and their numbers fit the head
PATCH = SIZE_MULTIPLE // VAE_STRIDE_S  # latent pixels that the transformer takes at once, each side
_HEAD = struct.Struct("<4sHHHHHIQ32s")
_CRC = struct.Struct("<I")


class MotionShape(NamedTuple):
    """Of a state's latents."""

    channels: int
    latent: LatentShape


@dataclass(frozen=True)
class ChainState:
    """The end of a chain."""

    motion: "Tensor"
    """(1, z, m, h, w) normalised fp32 on the CPU: the last denoised latents."""
    seed: int
    """The chain's base seed: of clip 0."""
    next_index: int
    """Of the clip that comes next; clips count through the whole film."""
    anchor_sha256: bytes


def anchor_digest(anchor: "Tensor") -> bytes:
    """Identify an anchor by its pixels (1, 3, 1, H, W), fp32."""
    return hashlib.sha256(anchor.cpu().contiguous().numpy().tobytes()).digest()


def pack_state(state: ChainState) -> str:
    """The state as base64 text, for a response."""
    _, channels, frames, height, width = state.motion.shape
    latents = state.motion.cpu().contiguous().numpy().astype("<f4").tobytes()
    head = _HEAD.pack(
        MAGIC, VERSION, frames, channels, height, width, state.next_index, state.seed, state.anchor_sha256
    )
    return base64.b64encode(head + _CRC.pack(zlib.crc32(head + latents)) + latents).decode()


def unpack_state(text: str) -> ChainState:
    """Read a state back. Its base64 may be URL-safe, unpadded, or broken into lines.

    Raises:
        InvalidInput: no state, one of another version, a damaged one, or one of values that are no numbers.
    """
    import numpy as np
    import torch

    head, latents = _checked(text)
    _, _, frames, channels, height, width, next_index, seed, digest = _HEAD.unpack(head)
    motion = torch.from_numpy(np.frombuffer(latents, "<f4").astype(np.float32))
    if not torch.isfinite(motion).all():
        raise _refuse("holds values that are no numbers")
    return ChainState(motion.view(1, channels, frames, height, width), seed, next_index, digest)


def base_seed(text: str) -> int:
    """The chain's base seed: what a job that goes on from this state uses where its request names no seed.

    Raises:
        InvalidInput: no state, one of another version, or a damaged one.
    """
    head, _ = _checked(text)
    seed: int = _HEAD.unpack(head)[7]
    return seed


def motion_shape(text: str) -> MotionShape:
    """The size of a state's latents, without torch.

    Raises:
        InvalidInput: as `base_seed`.
    """
    head, _ = _checked(text)
    _, _, frames, channels, height, width, *_ = _HEAD.unpack(head)
    return MotionShape(channels, LatentShape(frames, height, width))


def check_fits(motion: MotionShape, shape: LatentShape, channels: int) -> None:
    """Refuse a state that this job cannot go on from; `shape.frames`: the motion latents that it takes.

    Raises:
        InvalidInput: names both sizes.
    """
    if motion != MotionShape(channels, shape):
        raise _refuse(f"holds {_size(motion.latent)}; this job goes on from {_size(shape)}")


def _size(shape: LatentShape) -> str:
    return f"{shape.frames} latents of {shape.width * VAE_STRIDE_S}x{shape.height * VAE_STRIDE_S}"


def _checked(text: str) -> tuple[bytes, bytes]:
    """The head and the latents of a state that is whole."""
    raw = _decode(text)
    if len(raw) < _HEAD.size + _CRC.size or raw[: len(MAGIC)] != MAGIC:
        raise _refuse("is no state that this worker returned")
    head, latents = raw[: _HEAD.size], raw[_HEAD.size + _CRC.size :]
    _, version, frames, channels, height, width, next_index, seed, _ = _HEAD.unpack(head)
    if version != VERSION:
        raise _refuse(f"is of version {version}; this worker reads version {VERSION}")
    if _CRC.unpack_from(raw, _HEAD.size)[0] != zlib.crc32(head + latents):
        raise _refuse("is damaged: its checksum does not match")
    if not latents or len(latents) != 4 * frames * channels * height * width:
        raise _refuse("is damaged: its length does not match its size")
    if height % PATCH or width % PATCH or next_index > MAX_INDEX or seed > MAX_SEED:
        raise _refuse("holds numbers that no state of this worker has")  # its checksum is no signature
    return head, latents


def _decode(text: str) -> bytes:
    compact = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refuse("is not base64") from error


def _refuse(sentence: str) -> InvalidInput:
    return InvalidInput([Problem("state", sentence)])
