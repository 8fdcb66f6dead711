"""Who may run on a card: the estimate never falls, what is admitted fits, what a refusal names is admitted."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import pytest

from engine import demand as demand_module
from engine.activations import work_bytes
from engine.admission import Gate, Limits
from engine.demand import Demand
from engine.geometry import VideoShape
from engine.profiles import DEFAULTS, PROFILES, resolve
from engine.residency import GIB, plan
from engine.weights import twin_of
from schemas.errors import InvalidInput, RequestTooLarge
from schemas.input_schema import Request, parse_request
from tests.conftest import ROOT, photo

VIDEO = {"mode": "video", "prompt": "a fox", "image_url": "data:,"}
SVI = {"mode": "svi_endframe", "prompt": "a fox", "image_start": "data:,", "image_end": "data:,"}
IMAGE = {"prompt": "a fox"}
MODES = {"video": VIDEO, "svi_endframe": SVI, "image": IMAGE}

FRAMES = range(5, 162, 4)
SIDES = range(256, 1281, 16)
SHAPES = [VideoShape(*numbers) for numbers in product(FRAMES, SIDES, SIDES)]
WAN21 = PROFILES["wan21_i2v_480p"]


def gate(payload: dict, gib: float = 44.5, precision: str | None = None, most_gpx: float | None = None) -> Gate:
    return Gate(resolve(parse_request(payload)), Limits(int(gib * GIB), precision, most_gpx))


def refusal(at: Gate, payload: dict) -> str:
    with pytest.raises(RequestTooLarge) as caught:
        at.admit(parse_request(payload))
    return caught.value.sentence


def falls(estimate: Callable[[VideoShape], int]) -> list[VideoShape]:
    """The shapes of the lattice from which the estimate falls when frames, height or width grow by a step."""
    estimates = {shape: estimate(shape) for shape in SHAPES}
    found = []
    for (frames, height, width), size_bytes in estimates.items():
        larger = ((frames + 4, height, width), (frames, height + 16, width), (frames, height, width + 16))
        if any(
            estimates.get(VideoShape(*one), size_bytes) < size_bytes for one in larger
        ):  # beyond the lattice: as large
            found.append(VideoShape(frames, height, width))
    return found


@pytest.mark.parametrize("is_narrow", [False, True])
def test_estimate_never_falls_over_the_whole_lattice(is_narrow: bool) -> None:
    assert falls(partial(work_bytes, WAN21, is_narrow=is_narrow)) == []


def test_estimate_that_falls_somewhere_is_found_out() -> None:
    def in_chunks(shape: VideoShape) -> int:  # as if a last, shorter chunk were the largest
        return work_bytes(WAN21, shape) + (shape.frames % 8) * 10**9

    assert falls(in_chunks)


def test_estimate_never_falls_with_the_number_of_pictures() -> None:
    sdxl = PROFILES["sdxl"]
    for side in range(64, 4097, 64):
        sizes = [work_bytes(sdxl, VideoShape(1, side, side), images) for images in range(1, 5)]
        assert sizes == sorted(sizes)


def test_estimate_is_the_measurement_where_it_was_measured() -> None:
    assert work_bytes(WAN21, VideoShape(81, 480, 832)) == WAN21.work_bytes
    assert work_bytes(WAN21, VideoShape(81, 480, 832), is_narrow=True) == WAN21.narrow_work_bytes
    assert work_bytes(PROFILES["sdxl"], VideoShape(1, 1024, 1024)) == PROFILES["sdxl"].work_bytes


@pytest.mark.parametrize(("gib", "precision"), [(44.5, None), (44.5, "fp8"), (24.0, None)])
def test_admitted_fits_by_some_placement_and_refused_by_none(gib: float, precision: str | None) -> None:
    at = gate(VIDEO, gib, precision)
    admitted = 0
    for shape in SHAPES[::61]:
        try:
            made = plan(WAN21, int(gib * GIB), precision=precision, shape=shape)
            assert made.card_bytes <= gib * GIB
            is_placed = True
        except RequestTooLarge:
            is_placed = False
        assert at.fits(Demand(shape, 0)) == is_placed, shape
        admitted += is_placed
    assert 0 < admitted < len(SHAPES[::61])


@pytest.mark.parametrize(("mode", "frames"), [("video", "num_frames"), ("svi_endframe", "video_length")])
def test_what_a_refusal_names_is_admitted(mode: str, frames: str) -> None:
    at = gate(MODES[mode], 20.0)
    named = 0
    for height, width in product(range(256, 1281, 128), range(256, 1281, 128)):
        for count in (5, 33, 81, 121, 161):
            payload = {**MODES[mode], "height": height, "width": width, frames: count}
            if at.fits(wanted(at, payload)):
                continue
            sentence = refusal(at, payload)
            assert sentence.startswith(f"{width}x{height} with {count} frames would take ")
            for text in re.findall(r"(\d+x\d+ with \d+ frames(?: as \d+ clips)?)", sentence.split("what fits:")[1]):
                w, h, n, clips = re.fullmatch(r"(\d+)x(\d+) with (\d+) frames(?: as (\d+) clips)?", text).groups()
                assert int(w) <= width and int(h) <= height and int(n) <= count
                other = {**MODES[mode], "height": int(h), "width": int(w), frames: int(n)}
                at.admit(parse_request(other | ({"segments": int(clips)} if clips else {})))
                named += 1
    assert named > 50


def wanted(at: Gate, payload: dict) -> Demand:
    found = demand_module.demand(parse_request(payload), at.profile)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("payload", "gib", "sentence"),
    [
        (
            {**VIDEO, "height": 1280, "width": 1280, "num_frames": 161},
            44.5,
            "1280x1280 with 161 frames would take 47.3 GiB of card memory, and this card has 44.5 GiB; "
            "what fits: 1280x1280 with 113 frames, or 1232x1232 with 161 frames",
        ),
        (
            {**IMAGE, "height": 2048, "width": 2048, "num_images": 4},
            44.5,
            "4 pictures of 2048x2048 would take 65.2 GiB of card memory, and this card has 44.5 GiB; "
            "what fits: 4 pictures of 1600x1600, or 2 pictures of 2048x2048",
        ),
        (
            VIDEO,
            12.0,
            "832x480 with 81 frames would take 13.2 GiB of card memory, and this card has 12.0 GiB; "
            "no smaller size of this request fits",
        ),
    ],
)
def test_refusal_says_what_would_fit(payload: dict, gib: float, sentence: str) -> None:
    assert refusal(gate(payload, gib), payload) == sentence


def test_without_the_guard_the_same_request_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = {**VIDEO, "height": 1280, "width": 1280, "num_frames": 161}
    monkeypatch.setattr(Gate, "fits", lambda *_: True)
    assert gate(payload).admit(parse_request(payload)) is not None


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("precision", [None, "fp8"])
def test_default_request_is_admitted_on_a_48_gb_card(mode: str, precision: str | None) -> None:
    at = gate(MODES[mode], 44.5, precision, most_gpx=25.0)
    assert at.admit(parse_request(MODES[mode])) is not None


@pytest.mark.parametrize("mode", sorted(MODES))
def test_twin_is_admitted_where_its_model_is(mode: str) -> None:
    request = parse_request(MODES[mode])
    assert Gate(twin_of(resolve(request)), Limits(int(44.5 * GIB))).admit(request) is not None


@pytest.mark.parametrize("mode", ["video", "svi_endframe"])
def test_size_that_follows_a_picture_counts_as_the_largest_it_can_become(mode: str) -> None:
    for row in (DEFAULTS[mode], twin_of(DEFAULTS[mode])):
        _, height, width = wanted(Gate(row, Limits(0)), MODES[mode]).shape
        assert height * width >= row.max_area


def test_picture_that_keeps_its_size_is_judged_once_it_is_seen() -> None:
    payload = {**IMAGE, "image_url": "data:,"}
    at, request = gate(payload), parse_request(payload)
    assert at.admit(request) is None
    assert at.admit(request, {"image_url": photo(64, 64)}).shape == VideoShape(1, 64, 64)
    with pytest.raises(RequestTooLarge, match=r"1 picture of 4096x4096 .* what fits: 1 picture of 3208x3208"):
        at.admit(request, {"image_url": photo(64, 64).resize((4096, 4096))})


LONG = {**SVI, "segments": 16}


@pytest.mark.parametrize(
    ("payload", "most_gpx", "sentence"),
    [
        (
            {**VIDEO, "num_inference_steps": 500},
            25.0,
            "832x480 with 81 frames would be 32.3 gigapixels of work (pixels x frames x forwards), and this worker "
            "takes 25 (WORKER_MAX_WORK); what fits: 832x480 with 61 frames, or 720x416 with 81 frames, "
            "or num_inference_steps 386",
        ),
        (
            LONG,
            2.0,
            "832x480 with 1221 frames as 16 clips would be 3.11 gigapixels of work (pixels x frames x forwards), and "
            "this worker takes 2 (WORKER_MAX_WORK); what fits: 832x480 with 757 frames as 16 clips, "
            "or 656x384 with 1221 frames as 16 clips, or num_inference_steps 3",
        ),
        (
            {**IMAGE, "num_images": 4},
            0.2,
            "4 pictures of 1024x1024 would be 0.336 gigapixels of work (pixels x frames x forwards), and this worker "
            "takes 0.2 (WORKER_MAX_WORK); what fits: 4 pictures of 784x784, or 2 pictures of 1024x1024, "
            "or num_inference_steps 8",
        ),
    ],
    ids=["video", "svi_endframe", "image"],
)
def test_work_over_the_bound_is_refused_with_what_passes(payload: dict, most_gpx: float, sentence: str) -> None:
    assert refusal(gate(payload, most_gpx=most_gpx), payload) == sentence


def test_work_named_by_a_refusal_passes() -> None:
    at = gate(LONG, most_gpx=2.0)
    for smaller in ({"video_length": 757}, {"resolution": "656x384"}, {"num_inference_steps": 3}):
        assert at.admit(parse_request({**LONG, **smaller})) is not None


@pytest.mark.parametrize(
    ("payload", "host_gib", "sentence"),
    [
        (
            SVI,
            50,
            "832x480 with 81 frames would take 63.9 GiB of host memory, and this host has 50.0 GiB; "
            "no smaller size of this request fits",
        ),
        (
            {**VIDEO, "height": 1280, "width": 1280, "num_frames": 81},
            30,
            "1280x1280 with 81 frames would take 43.5 GiB of host memory, and this host has 30.0 GiB; "
            "what fits: 736x736 with 81 frames",
        ),
    ],
    ids=["svi_endframe", "video"],
)
def test_host_without_room_for_what_the_card_cannot_hold_is_told(payload: dict, host_gib: int, sentence: str) -> None:
    on_a_card = gate(payload).limits
    assert Gate(resolve(parse_request(payload)), on_a_card).admit(parse_request(payload)) is not None
    beside_little = Gate(resolve(parse_request(payload)), replace(on_a_card, host_bytes=host_gib * GIB))
    assert refusal(beside_little, payload) == sentence


def test_size_named_for_a_small_host_is_admitted_there() -> None:
    payload = {**VIDEO, "height": 736, "width": 736}
    at = Gate(resolve(parse_request(payload)), Limits(int(44.5 * GIB), host_bytes=30 * GIB))
    assert at.admit(parse_request(payload)) is not None


LARGE_FILM = {**SVI, "resolution": "1280x1280", "video_length": 161}


@pytest.mark.parametrize(
    ("payload", "gib", "most_gpx", "named"),
    [
        (
            {**IMAGE, "height": 2048, "width": 2048, "num_images": 4},
            44.5,
            0.5,
            "4 pictures of 1248x1248, or 1 picture of 2048x2048",
        ),
        (
            LARGE_FILM,
            42.0,
            1.75,
            "1280x1280 with 73 frames, or 1280x1280 with 161 frames as 4 clips, or 1264x1264 with 161 frames",
        ),
        (LARGE_FILM, 42.0, 1.70, "1280x1280 with 73 frames, or 1264x1264 with 161 frames"),
    ],
    ids=["pictures", "clips", "clips that repeat too many frames"],
)
def test_refusal_for_memory_names_only_what_is_little_enough_work(
    payload: dict, gib: float, most_gpx: float, named: str
) -> None:
    sentence = refusal(gate(payload, gib, most_gpx=most_gpx), payload)
    assert re.search(r" GiB; what fits: (.*)$", sentence)[1] == named


@pytest.mark.parametrize("payload", [LONG, {**VIDEO, "num_inference_steps": 500}])
def test_no_bound_admits_any_work(payload: dict) -> None:
    assert gate(payload, most_gpx=None).admit(parse_request(payload)) is not None


def test_bound_of_the_settings_admits_the_longest_chain_of_the_lightning_profile_at_720p() -> None:
    payload = {**LONG, "resolution": "1280x720"}
    assert gate(payload, most_gpx=25.0).admit(parse_request(payload)).work_gpx == pytest.approx(7.17, abs=0.01)


def test_advice_after_out_of_memory_names_smaller_requests() -> None:
    at = gate(VIDEO)
    request: Request = parse_request({**VIDEO, "height": 480, "width": 832})
    assert at.advice(request) == "try 720x416 with 81 frames"
    assert gate(IMAGE).advice(parse_request({**IMAGE, "num_images": 2})) == (
        "try 2 pictures of 864x864, or 1 picture of 1024x1024"
    )


def test_advice_says_so_when_nothing_is_smaller() -> None:
    smallest = {**VIDEO, "height": 256, "width": 256, "num_frames": 5}
    assert gate(VIDEO).advice(parse_request(smallest)) == "there is no smaller size of this request to try"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"resolution": "480x240"}, "resolution: must have sides of at least 256, got 480x240"),
        ({"loras_multipliers": "1"}, "loras_multipliers: has 1 entries; this profile has 4 LoRAs"),
    ],
)
def test_what_the_profile_cannot_run_is_refused_on_any_card(fields: dict, sentence: str) -> None:
    payload = {**SVI, **fields}
    with pytest.raises(InvalidInput) as caught:
        gate(payload, 10_000.0).admit(parse_request(payload))
    assert caught.value.sentence == sentence


def test_deciding_needs_no_torch() -> None:
    code = (
        "import sys; from engine.admission import Gate, Limits; from engine.profiles import resolve;"
        "from schemas.input_schema import parse_request;"
        f"request = parse_request({SVI!r}); print(Gate(resolve(request), Limits(2**36)).admit(request).forwards);"
        "print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["6", "[]"]
