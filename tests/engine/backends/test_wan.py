"""Wan2.1 through our backend equals diffusers called by hand with the same parts."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from engine import profiles, weights
from engine.backends import Task
from engine.backends.wan import Wan
from engine.card import Card
from engine.outputs import Frames
from engine.pictures import fit_picture
from engine.progress import Progress, Update
from engine.settings import Settings
from schemas.errors import Cancelled
from schemas.input_schema import parse_request
from tests.conftest import data_uri, photo

SMALL = {"mode": "video", "prompt": "a fox runs", "height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def parts(twins: Any) -> weights.Parts:
    return weights.locate(profiles.PROFILES["wan21_i2v_480p"], Settings(weights_dir=twins)).parts()


@pytest.fixture(scope="module")
def wan(parts: weights.Parts) -> Wan:
    return Wan(parts.profile, parts, Card("cpu", 2**40))


def task(wan: Wan, payload: dict[str, Any], seed: int = 7) -> Task:
    picture = photo(128, 160)
    return Task(wan.profile, parse_request({**payload, "image_url": data_uri(picture)}), seed, {"image_url": picture})


def frames_of(frames: Frames) -> np.ndarray:
    return np.concatenate(list(frames.chunks))


def by_hand(parts: weights.Parts, payload: dict[str, Any], seed: int = 7) -> torch.Tensor:
    """Plain diffusers from the same parts: (F, 3, H, W) float in [0, 1]."""
    from diffusers import WanImageToVideoPipeline

    pipeline = WanImageToVideoPipeline(**{part.name: parts.load(part.name) for part in parts.profile.components})
    request = parse_request({**payload, "image_url": "data:,"})
    video: torch.Tensor = pipeline(
        image=fit_picture(photo(128, 160), 64, 96), prompt=request.prompt, negative_prompt=request.negative_prompt,
        height=64, width=96, num_frames=request.num_frames, num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale, generator=torch.Generator("cpu").manual_seed(seed), output_type="pt",
    ).frames[0]  # fmt: skip
    return video


@pytest.mark.parametrize("extra", [{}, {"guidance_scale": 1.0}, {"negative_prompt": "blurry", "num_frames": 5}])
def test_video_equals_plain_diffusers_bit_for_bit(
    wan: Wan, parts: weights.Parts, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the floats, before they become bytes
    monkeypatch.setattr("engine.backends.wan.stream_uint8", lambda chunks: chunks)
    payload = {**SMALL, **extra}
    chunks = list(wan.generate(task(wan, payload), Progress()).chunks)
    ours = (torch.cat(chunks, dim=1).transpose(0, 1) / 2 + 0.5).clamp(0, 1)  # as diffusers' VideoProcessor scales
    assert torch.equal(ours, by_hand(parts, payload))


def test_steps_whose_first_two_timesteps_are_the_same_whole_number_come_to_their_end(
    wan: Wan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock pipeline starts such a grid at its second step, and fails after the last one."""

    def see_nothing(_: Any, hidden_states: torch.Tensor, **__: Any) -> tuple[torch.Tensor]:
        return (hidden_states[:, :16],)

    monkeypatch.setattr(WanTransformer3DModel, "forward", see_nothing)  # 334 times the twin takes 13 s
    asked = {**SMALL, "num_inference_steps": 334, "guidance_scale": 1.0, "num_frames": 5, "height": 32, "width": 32}
    seen: list[Update] = []
    frames_of(wan.generate(task(wan, asked), Progress(seen.append)))
    assert [update.step for update in seen if update.stage == "denoise"][-1] == 334


def test_size_follows_the_pictures_aspect(wan: Wan) -> None:
    payload = {name: value for name, value in SMALL.items() if name not in {"height", "width"}}
    frames = wan.generate(task(wan, {**payload, "num_inference_steps": 1, "num_frames": 5}), Progress())
    assert frames.shape[1:] == (80, 96)  # 128 x 160: aspect 1.25, in the twin's area of 96 x 96


def test_same_seed_is_the_same_video_and_another_job_in_between_changes_nothing(wan: Wan) -> None:
    first = frames_of(wan.generate(task(wan, SMALL), Progress()))
    frames_of(wan.generate(task(wan, {**SMALL, "num_frames": 5, "guidance_scale": 1.0, "fps": 8}, seed=9), Progress()))
    assert np.array_equal(first, frames_of(wan.generate(task(wan, SMALL), Progress())))


def test_progress_and_cancel_are_per_step(wan: Wan) -> None:
    updates: list[Update] = []
    frames_of(wan.generate(task(wan, SMALL), Progress(updates.append)))
    assert [u.step for u in updates if u.stage == "denoise"] == [0, 1, 2, 3]
    progress = Progress(lambda update: progress.cancelled.set() if update.step == 1 else None)
    with pytest.raises(Cancelled):
        wan.generate(task(wan, SMALL), progress)


def test_known_prompt_and_picture_ask_no_encoder(wan: Wan, monkeypatch: pytest.MonkeyPatch) -> None:
    frames_of(wan.generate(task(wan, SMALL), Progress()))

    def refuse() -> None:
        pytest.fail("an encoder was called")

    monkeypatch.setattr(wan._prompts, "_use_encoder", refuse)
    monkeypatch.setattr(wan._pictures, "_use_encoder", refuse)
    frames_of(wan.generate(task(wan, SMALL), Progress()))


def test_what_the_operator_should_know_of_the_card_stays_in_the_log(wan: Wan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan._placed, "notes", ("decode without fused passes: RuntimeError: /root/.triton/cache",))
    assert wan.generate(task(wan, {**SMALL, "num_inference_steps": 1}), Progress()).notes == ()


def test_notes_tell_of_a_prompt_longer_than_the_model_reads(wan: Wan) -> None:
    frames = wan.generate(task(wan, {**SMALL, "prompt": "fox " * 600, "num_inference_steps": 1}), Progress())
    assert [note.endswith(" tokens long; the model reads the first 512") for note in frames.notes] == [True]


def test_frames_are_decoded_without_gradients_and_leave_the_readers_mode_alone(wan: Wan) -> None:
    frames = wan.generate(task(wan, {**SMALL, "num_inference_steps": 1}), Progress())
    next(frames.chunks)
    assert not torch.is_inference_mode_enabled()
    with torch.inference_mode():
        frames.chunks.close()  # whoever drops a film half-way, wherever
        assert torch.is_inference_mode_enabled()


def test_job_ends_for_the_compiler_when_its_frames_are_decoded(wan: Wan, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()
    monkeypatch.setattr(wan._placed, "end_job", lambda: seen.append("end"))
    frames_of(wan.generate(task(wan, SMALL), Progress(lambda update: seen.append(update.stage))))
    assert list(dict.fromkeys(seen)) == ["encode", "denoise", "decode", "end"]


def test_decoder_is_prepared_beside_the_forwards(wan: Wan, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()
    monkeypatch.setattr(wan._placed, "forwards_begin", lambda: seen.append("decoder"))
    frames_of(wan.generate(task(wan, SMALL), Progress(lambda update: seen.append(update.stage))))
    assert list(dict.fromkeys(seen))[:3] == ["encode", "decoder", "denoise"]
