import base64
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.chain_state import (
    ChainState,
    MotionShape,
    anchor_digest,
    base_seed,
    check_fits,
    motion_shape,
    pack_state,
    unpack_state,
)
from engine.geometry import LatentShape
from schemas.errors import InvalidInput
from tests.engine.svi_parts import noise, pixels

ROOT = Path(__file__).resolve().parents[2]
STATE = ChainState(noise(1, height=4, width=6), seed=2**63 - 1, next_index=3, anchor_sha256=bytes(range(32)))
HEAD = 4 + 2 * 5 + 4 + 8 + 32 + 4


def edited(at, value):
    raw = bytearray(base64.b64decode(pack_state(STATE)))
    raw[at : at + len(value)] = value
    return base64.b64encode(raw).decode()


def refusal(text):
    with pytest.raises(InvalidInput) as caught:
        unpack_state(text)
    (problem,) = caught.value.problems
    assert problem.field == "state"
    return problem.message


def test_state_comes_back_bit_for_bit():
    got = unpack_state(pack_state(STATE))

    assert torch.equal(got.motion, STATE.motion)
    assert replace(got, motion=STATE.motion) == STATE


def test_state_at_480p_is_532_kilobytes():
    state = replace(STATE, motion=torch.zeros(1, 16, 1, 60, 104))

    assert len(pack_state(state)) == 532_564


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("+", "-").replace("/", "_"),
        lambda text: text.rstrip("="),
        lambda text: "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
    ],
)
def test_state_survives_the_usual_rewritings_of_base64(change):
    assert torch.equal(unpack_state(change(pack_state(STATE))).motion, STATE.motion)


@pytest.mark.parametrize("text", ["", "AAAA", base64.b64encode(bytes(200)).decode(), "SVIS"])
def test_foreign_bytes_are_no_state(text):
    assert refusal(text) == "is no state that this worker returned"


@pytest.mark.parametrize("text", ["a", "????", "äöü=", "A" * 9])
def test_text_that_is_no_base64_is_refused(text):
    assert refusal(text) == "is not base64"


def test_another_version_is_refused():
    assert refusal(edited(4, (2).to_bytes(2, "little"))) == "is of version 2; this worker reads version 1"


@pytest.mark.parametrize("at", [8, 14, 20, 40, HEAD, HEAD + 100])
def test_a_changed_byte_is_noticed(at):
    original = base64.b64decode(pack_state(STATE))[at]

    assert refusal(edited(at, bytes([original ^ 1]))) == "is damaged: its checksum does not match"


def test_a_cut_state_is_noticed():
    whole = base64.b64decode(pack_state(STATE))

    assert refusal(base64.b64encode(whole[:-8]).decode()) == "is damaged: its checksum does not match"


def test_a_state_that_lies_about_its_size_is_refused():
    lying = replace(STATE, motion=STATE.motion[:, :, :, :, :5])
    raw = bytearray(base64.b64decode(pack_state(lying)))
    honest = base64.b64decode(pack_state(STATE))
    raw[: HEAD - 4] = honest[: HEAD - 4]
    raw[HEAD - 4 : HEAD] = zlib.crc32(bytes(raw[: HEAD - 4] + raw[HEAD:])).to_bytes(4, "little")

    assert refusal(base64.b64encode(raw).decode()) == "is damaged: its length does not match its size"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(value):
    motion = STATE.motion.clone()
    motion[0, 3, 0, 1, 1] = value

    assert refusal(pack_state(replace(STATE, motion=motion))) == "holds values that are no numbers"


@pytest.mark.parametrize("change", [{"seed": 2**63}, {"seed": 2**64 - 1}, {"next_index": 2**32 - 1}])
def test_numbers_that_would_overflow_on_the_way_are_refused_though_the_checksum_is_right(change):
    assert refusal(pack_state(replace(STATE, **change))) == "holds numbers that no state of this worker has"


@pytest.mark.parametrize(("height", "width"), [(4, 5), (3, 6)])
def test_latents_that_the_transformer_cannot_cut_into_patches_are_refused(height, width):
    odd = replace(STATE, motion=noise(1, height=height, width=width))

    assert refusal(pack_state(odd)) == "holds numbers that no state of this worker has"


def test_state_fits_the_size_it_was_made_at():
    check_fits(motion_shape(pack_state(STATE)), LatentShape(1, 4, 6), 16)


@pytest.mark.parametrize(
    ("shape", "channels"),
    [(LatentShape(1, 6, 4), 16), (LatentShape(2, 4, 6), 16), (LatentShape(1, 4, 6), 8)],
)
def test_state_of_another_size_is_refused(shape, channels):
    with pytest.raises(InvalidInput, match="state: holds 1 latents of 48x32"):
        check_fits(MotionShape(16, LatentShape(1, 4, 6)), shape, channels)


def test_digest_tells_anchors_apart():
    assert anchor_digest(pixels(1)) == anchor_digest(pixels(1))
    assert anchor_digest(pixels(1)) != anchor_digest(pixels(1, seed=1))


def test_base_seed_is_read_from_a_whole_state_only():
    assert base_seed(pack_state(STATE)) == 2**63 - 1
    with pytest.raises(InvalidInput, match="no state of this worker"):
        base_seed(pack_state(replace(STATE, seed=2**63)))
    with pytest.raises(InvalidInput, match="damaged"):
        base_seed(edited(HEAD + 4, b"\x07"))


def test_motion_shape_is_that_of_the_latents():
    assert motion_shape(pack_state(STATE)) == MotionShape(16, LatentShape(1, 4, 6))
    with pytest.raises(InvalidInput, match="damaged"):
        motion_shape(edited(HEAD + 4, b"\x07"))


def test_reading_a_base_seed_and_a_size_needs_no_torch():
    code = (
        "import sys; from engine.chain_state import base_seed, motion_shape; "
        f"state = {pack_state(STATE)!r}; motion_shape(state); print(base_seed(state), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.split() == [str(2**63 - 1), "False"]
