"""The fast `video` equals diffusers' two-expert pipeline called by hand with the same parts."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

import handler
from engine import profiles, weights
from engine.backends import Task
from engine.backends.wan_lightning import WanLightning, phases_for
from engine.card import Card
from engine.outputs import Frames
from engine.pictures import fit_picture
from engine.placing import Placed
from engine.progress import Progress, Update
from engine.scheduler import DistilledEuler, Split, split_at, timesteps_of
from engine.settings import Settings
from schemas.errors import Cancelled
from schemas.input_schema import parse_request
from tests.conftest import data_uri, decode_video, photo

ROW = profiles.PROFILES["wan22_i2v_lightning"]
SMALL = {
    "mode": "video", "model_type": "wan22_i2v_lightning", "prompt": "a fox runs", "height": 64, "width": 96,
    "num_frames": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(twins: Any) -> weights.Parts:
    return weights.locate(ROW, Settings(weights_dir=twins)).parts()


@pytest.fixture(scope="module")
def lightning(parts: weights.Parts) -> WanLightning:
    return WanLightning(parts.profile, parts, Card("cpu", 2**40))


def task(backend: WanLightning, picture: Image.Image | None = None, seed: int = 7, **fields: Any) -> Task:
    picture = photo(128, 160) if picture is None else picture
    request = parse_request({**SMALL, "image_url": data_uri(picture), **fields})
    return Task(backend.profile, request, seed, {"image_url": picture})


def run(backend: WanLightning, *args: Any, progress: Progress | None = None, **fields: Any) -> np.ndarray:
    frames = backend.generate(task(backend, *args, **fields), progress or Progress())
    return frames_of(frames)


def frames_of(frames: Frames) -> np.ndarray:
    video = np.concatenate(list(frames.chunks))
    assert video.shape == (*frames.shape, 3)
    return video


def calls_of(backend: WanLightning) -> list[str]:
    """The experts of a backend from now on, one letter a forward."""
    seen: list[str] = []
    for name, letter in (("high", "H"), ("low", "L")):
        backend._placed.experts._models[name].register_forward_pre_hook(lambda *_, letter=letter: seen.append(letter))
    return seen


def by_hand(parts: weights.Parts, steps: int, frames: int, boundary: float = 0.9) -> torch.Tensor:
    """Plain diffusers with two transformers and Wan2.2's boundary, on the same grid: (F, 3, H, W) in [0, 1]."""
    made = {part.name: parts.load(part.name) for part in parts.profile.components if part.name != "scheduler"}
    pipeline = WanImageToVideoPipeline(**made, scheduler=DistilledEuler(shift=5.0), boundary_ratio=boundary)
    pipeline.set_progress_bar_config(disable=True)
    video: torch.Tensor = pipeline(
        image=fit_picture(photo(128, 160), 64, 96), prompt="a fox runs", height=64, width=96, num_frames=frames,
        num_inference_steps=steps, guidance_scale=1.0, guidance_scale_2=1.0,
        generator=torch.Generator("cpu").manual_seed(7), output_type="pt",
    ).frames[0]  # fmt: skip
    return video


def ours(lightning: WanLightning, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> torch.Tensor:
    """The floats, before they become bytes, scaled as diffusers' VideoProcessor does."""
    monkeypatch.setattr("engine.backends.wan_lightning.stream_uint8", lambda chunks: chunks)
    chunks = list(lightning.generate(task(lightning, **fields), Progress()).chunks)
    return (torch.cat(chunks, dim=1).transpose(0, 1) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(("steps", "frames"), [(4, 9), (6, 5)])
def test_video_equals_plain_diffusers_bit_for_bit(
    lightning: WanLightning, parts: weights.Parts, steps: int, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ours(lightning, monkeypatch, num_inference_steps=steps, num_frames=frames)
    assert torch.equal(made, by_hand(parts, steps, frames))


def test_video_with_another_boundary_would_be_another(
    lightning: WanLightning, parts: weights.Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: 0.95 lets the high-noise expert run one step of four in place of two."""
    assert not torch.equal(ours(lightning, monkeypatch), by_hand(parts, 4, 9, boundary=0.95))


@pytest.mark.parametrize(
    ("steps", "experts"), [(4, "HHLL"), (5, "HHLLL"), (6, "HHHLLL"), (7, "HHHLLLL"), (8, "HHHLLLLL")]
)
def test_experts_run_as_wans_boundary_divides_the_grid(lightning: WanLightning, steps: int, experts: str) -> None:
    seen = calls_of(lightning)
    run(lightning, num_inference_steps=steps, num_frames=5)
    assert "".join(seen) == experts


def test_without_a_number_of_steps_four_forwards_run(lightning: WanLightning) -> None:
    seen = calls_of(lightning)
    run(lightning, num_frames=5)
    assert "".join(seen) == "HHLL"


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(4, [1000.0, 937.5, 833.33, 625.0]), (6, [1000.0, 961.54, 909.09, 833.33, 714.29, 500.0])],
)
def test_grid_of_few_steps(steps: int, expected: list[float]) -> None:
    assert timesteps_of(DistilledEuler(shift=5.0), steps) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("steps", range(4, 9))
def test_boundary_lies_between_two_steps_so_that_diffusers_and_ours_divide_alike(steps: int) -> None:
    """diffusers counts a step on the boundary as high, ours as low: no step may lie on it."""
    grid = timesteps_of(DistilledEuler(shift=5.0), steps)
    assert min(abs(t - 900.0) for t in grid) > 7
    assert split_at(grid, 900.0) == Split(sum(t >= 900.0 for t in grid), sum(t < 900.0 for t in grid))


def test_profile_of_another_solver_is_refused() -> None:
    with pytest.raises(ValueError, match="no two phases on the distilled grid"):
        phases_for(replace(ROW, schedule=replace(ROW.schedule, solver="unipc")), 4, 1.0)


def test_picture_and_seed_and_prompt_decide_the_video_and_nothing_else_does(lightning: WanLightning) -> None:
    first = run(lightning)
    assert not np.array_equal(first, run(lightning, photo(128, 160, seed=1)))
    assert not np.array_equal(first, run(lightning, seed=8))
    assert not np.array_equal(first, run(lightning, prompt="deep snow", num_inference_steps=5, fps=8))
    assert np.array_equal(first, run(lightning))


def test_size_follows_the_pictures_aspect(lightning: WanLightning) -> None:
    frames = lightning.generate(task(lightning, height=None, width=None, num_frames=5), Progress())
    assert frames.shape == (5, 80, 96)  # 128 x 160: aspect 1.25, in the twin's area of 96 x 96


def test_progress_and_cancel_are_per_step(lightning: WanLightning) -> None:
    updates: list[Update] = []
    run(lightning, progress=Progress(updates.append))
    assert [update.step for update in updates if update.stage == "denoise"] == [0, 1, 2, 3, 4]
    progress = Progress(lambda update: progress.cancelled.set() if update.step == 1 else None)
    with pytest.raises(Cancelled):
        lightning.generate(task(lightning), progress)


def test_size_is_announced_before_the_first_forward_as_it_then_comes(
    lightning: WanLightning, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[tuple[str, tuple[int, ...]]] = []
    announce = Placed.expect

    def expect(placed: Placed, latents: Any) -> None:
        latents = list(latents)
        happened.extend(("announced", tuple(latent)) for latent in latents)
        announce(placed, latents)

    def forward(_model: Any, _args: Any, inputs: dict[str, Any]) -> None:
        happened.append(("forward", tuple(inputs["hidden_states"].shape[2:])))

    monkeypatch.setattr(Placed, "expect", expect)
    handle = lightning._placed.experts._models["high"].register_forward_pre_hook(forward, with_kwargs=True)
    run(lightning)
    handle.remove()
    assert happened == [("announced", (3, 8, 12)), ("forward", (3, 8, 12)), ("forward", (3, 8, 12))]


def test_job_through_the_worker_tells_how_it_ran_and_posted_again_makes_the_same(worker: Any) -> None:
    def answer(job_id: str, **fields: Any) -> dict[str, Any]:
        payload = {**SMALL, "image_url": data_uri(photo(128, 160)), **fields}
        return handler.run(payload, job_id=job_id, worker=worker, progress=Progress())

    first = answer("a", seed=7)
    assert first["profile"] == "tiny/wan22_i2v_lightning"
    ran = first["effective"]
    assert (ran["model_type"], ran["num_inference_steps"], ran["guidance_scale"]) == ("wan22_i2v_lightning", 4, 1.0)
    again = answer("b", **{name: value for name, value in ran.items() if name != "image_url"})
    assert np.array_equal(decode_video(first["video_url"]), decode_video(again["video_url"]))
    assert again["effective"] == ran
    other = answer("c", seed=7, model_type="wan21_i2v_480p", num_inference_steps=2)
    assert other["profile"] == "tiny/wan21_i2v_480p"
    assert not np.array_equal(decode_video(first["video_url"]), decode_video(other["video_url"]))


def test_notes_tell_of_a_prompt_longer_than_the_model_reads(lightning: WanLightning) -> None:
    frames = lightning.generate(task(lightning, prompt="fox " * 600), Progress())
    (note,) = frames.notes
    assert note.startswith("the prompt is ")
    assert note.endswith(" tokens long; the model reads the first 512")


def test_second_run_that_saves_memory_decodes_in_tiles(
    lightning: WanLightning, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiled: list[tuple[int, ...]] = []

    def noted(decode: Any, latents: torch.Tensor) -> Any:
        tiled.append(tuple(latents.shape))
        return decode(latents)

    monkeypatch.setattr("engine.tiled_decode.decode_tiled", noted)
    frames_of(lightning.generate(replace(task(lightning), saves_memory=True), Progress()))
    assert tiled == [(1, 16, 3, 8, 12)]
    run(lightning)
    assert len(tiled) == 1


def test_frames_are_decoded_without_gradients_and_leave_the_readers_mode_alone(lightning: WanLightning) -> None:
    frames = lightning.generate(task(lightning), Progress())
    next(frames.chunks)
    assert not torch.is_inference_mode_enabled()
    with torch.inference_mode():
        frames.chunks.close()  # whoever drops a film half-way, wherever
        assert torch.is_inference_mode_enabled()


def test_job_ends_for_the_compiler_when_its_frames_are_decoded(
    lightning: WanLightning, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[str]()
    monkeypatch.setattr(lightning._placed, "end_job", lambda: seen.append("end"))
    run(lightning, progress=Progress(lambda update: seen.append(update.stage)))
    assert list(dict.fromkeys(seen)) == ["encode", "denoise", "decode", "end"]


def test_decoder_is_prepared_beside_the_forwards(lightning: WanLightning, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()
    monkeypatch.setattr(lightning._placed, "forwards_begin", lambda: seen.append("decoder"))
    run(lightning, progress=Progress(lambda update: seen.append(update.stage)))
    assert list(dict.fromkeys(seen))[:3] == ["encode", "decoder", "denoise"]
