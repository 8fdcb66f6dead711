"""SDXL through our backend equals diffusers called by hand with the same parts, and no request leaves a trace."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine import profiles, weights
from engine.backends import Task
from engine.backends.sdxl import SCHEDULERS, Sdxl
from engine.card import Card
from engine.progress import Progress, Update
from engine.settings import Settings
from schemas.errors import Cancelled
from schemas.input_schema import parse_request
from tests.conftest import photo

SMALL = {"prompt": "a red fox", "height": 64, "width": 64, "num_inference_steps": 4, "refiner_inference_steps": 10}


@pytest.fixture(scope="module")
def sdxl(twins: Any) -> Sdxl:
    baked = weights.locate(profiles.PROFILES["sdxl"], Settings(weights_dir=twins))
    return Sdxl(baked.profile, baked.parts(), Card("cpu", 0))


def task(sdxl: Sdxl, payload: dict[str, Any], picture: Image.Image | None = None, seed: int = 7) -> Task:
    if picture is not None:
        payload = {**payload, "image_url": "data:image/png;base64,AAAA"}
    pictures = {} if picture is None else {"image_url": picture}
    return Task(sdxl.profile, parse_request(payload), seed, pictures)


def by_hand(sdxl: Sdxl, payload: dict[str, Any], picture: Image.Image | None = None, seed: int = 7) -> list[np.ndarray]:
    """Plain diffusers: two pipelines from the same parts, called as its documentation shows."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    parts, request = sdxl._parts, parse_request({**payload, **({"image_url": "data:,"} if picture else {})})
    base = StableDiffusionXLPipeline(
        **{n: parts[n] for n in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet")},
        scheduler=SCHEDULERS[request.scheduler].from_config(parts["scheduler"].config),
    )
    refiner = StableDiffusionXLImg2ImgPipeline(
        vae=parts["vae"], text_encoder=None, text_encoder_2=parts["text_encoder_2"], tokenizer=None,
        tokenizer_2=parts["tokenizer_2"], unet=parts["refiner_unet"],
        scheduler=type(parts["refiner_scheduler"]).from_config(parts["refiner_scheduler"].config),
        requires_aesthetics_score=True, force_zeros_for_empty_prompt=False,
    )  # fmt: skip
    generator = torch.Generator("cpu").manual_seed(seed)
    image: Any = picture
    if picture is None:
        image = base(
            prompt=request.prompt, negative_prompt=request.negative_prompt, height=request.height,
            width=request.width, num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale, denoising_end=request.high_noise_frac,
            num_images_per_prompt=request.num_images, generator=generator, output_type="latent",
        ).images  # fmt: skip
    pictures = refiner(
        prompt=request.prompt or "", negative_prompt=request.negative_prompt, image=image,
        num_inference_steps=request.refiner_inference_steps, strength=request.strength,
        denoising_start=request.high_noise_frac, guidance_scale=request.refiner_guidance_scale,
        num_images_per_prompt=request.num_images, generator=generator, output_type="pil",
    ).images  # fmt: skip
    return [np.asarray(picture) for picture in pictures]


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_text_to_image_equals_plain_diffusers_with_every_scheduler(sdxl: Sdxl, scheduler: str) -> None:
    payload = {**SMALL, "scheduler": scheduler}
    ours = sdxl.generate(task(sdxl, payload), Progress()).pictures
    assert np.array_equal(ours[0], by_hand(sdxl, payload)[0])


def test_two_pictures_with_a_negative_prompt_equal_plain_diffusers(sdxl: Sdxl) -> None:
    payload = {**SMALL, "num_images": 2, "negative_prompt": "blurry"}
    ours, theirs = sdxl.generate(task(sdxl, payload), Progress()).pictures, by_hand(sdxl, payload)
    assert len(ours) == 2
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not np.array_equal(ours[0], ours[1])


def test_high_noise_frac_hands_over_in_mid_schedule_as_diffusers_does(sdxl: Sdxl) -> None:
    payload = {**SMALL, "high_noise_frac": 0.7}
    assert np.array_equal(sdxl.generate(task(sdxl, payload), Progress()).pictures[0], by_hand(sdxl, payload)[0])


def test_picture_to_picture_equals_the_refiner_alone(sdxl: Sdxl) -> None:
    payload = {"prompt": "a red fox", "strength": 0.5, "refiner_inference_steps": 10}
    picture = photo(64, 96)
    ours = sdxl.generate(task(sdxl, payload, picture), Progress()).pictures[0]
    assert ours.shape == (64, 96, 3)
    assert np.array_equal(ours, by_hand(sdxl, payload, picture)[0])


def test_picture_without_a_prompt_is_legal(sdxl: Sdxl) -> None:
    assert len(sdxl.generate(task(sdxl, {"refiner_inference_steps": 10}, photo(64, 64)), Progress()).pictures) == 1


def test_negative_prompt_reaches_base_and_refiner(sdxl: Sdxl) -> None:
    picture = photo(64, 64)
    payload = {"prompt": "a red fox", "strength": 0.5, "refiner_inference_steps": 10}
    plain = sdxl.generate(task(sdxl, payload, picture), Progress()).pictures[0]
    other = sdxl.generate(task(sdxl, {**payload, "negative_prompt": "grass"}, picture), Progress()).pictures[0]
    assert not np.array_equal(plain, other)


@pytest.fixture
def encoder_calls(sdxl: Sdxl) -> Iterator[list[str]]:
    """The text encoders' forwards from now on, by component."""
    calls: list[str] = []
    names = ("text_encoder", "text_encoder_2")
    hooks = [sdxl._parts[n].register_forward_pre_hook(lambda *_, n=n: calls.append(n)) for n in names]
    yield calls
    for hook in hooks:
        hook.remove()


def test_known_words_ask_no_encoder_and_give_the_same_picture(sdxl: Sdxl, encoder_calls: list[str]) -> None:
    payload = {**SMALL, "prompt": "a blue fox", "negative_prompt": "mist"}
    first = sdxl.generate(task(sdxl, payload), Progress()).pictures[0]
    # prompt and negative prompt by both encoders for the base, and by the second one for the refiner
    assert sorted(encoder_calls) == ["text_encoder"] * 2 + ["text_encoder_2"] * 4
    encoder_calls.clear()

    again = sdxl.generate(task(sdxl, payload), Progress()).pictures[0]
    other = sdxl.generate(task(sdxl, {**payload, "scheduler": "PNDM", "num_images": 2}, seed=8), Progress()).pictures
    assert encoder_calls == []
    assert np.array_equal(first, again)
    assert np.array_equal(other[1], by_hand(sdxl, {**payload, "scheduler": "PNDM", "num_images": 2}, seed=8)[1])


@pytest.mark.parametrize(
    "changed",
    [
        {"negative_prompt": ""},  # not None: the base has zeros for None
        {"negative_prompt": "grass"},
        {"guidance_scale": 1.0},
        {"refiner_guidance_scale": 1.0, "negative_prompt": "grass"},
        {"prompt": "a Red fox"},
    ],
)
def test_words_are_not_taken_for_others(sdxl: Sdxl, changed: dict[str, Any]) -> None:
    sdxl.generate(task(sdxl, SMALL), Progress())
    payload = {**SMALL, **changed}
    assert np.array_equal(sdxl.generate(task(sdxl, payload), Progress()).pictures[0], by_hand(sdxl, payload)[0])


def test_notes_tell_of_words_longer_than_clip_reads(sdxl: Sdxl) -> None:
    payload = {**SMALL, "prompt": "fox " * 76, "negative_prompt": "fox " * 75}
    notes = sdxl.generate(task(sdxl, payload), Progress()).notes
    assert notes == ("the prompt is 78 tokens long; the model reads the first 77",)


@pytest.mark.parametrize(
    ("height", "width", "notes"),
    [
        (64, 96, ()),
        (77, 101, ("image_url is 101x77 pixels and was scaled to 96x72: sides must be multiples of 8",)),
    ],
)
def test_notes_tell_of_a_picture_that_was_scaled(sdxl: Sdxl, height: int, width: int, notes: tuple[str, ...]) -> None:
    job = task(sdxl, {"prompt": "a red fox", "refiner_inference_steps": 10}, photo(height, width))
    assert sdxl.generate(job, Progress()).notes == notes


def test_scheduler_of_one_request_is_not_seen_by_the_next(sdxl: Sdxl) -> None:
    first = sdxl.generate(task(sdxl, SMALL), Progress()).pictures[0]
    sdxl.generate(task(sdxl, {**SMALL, "scheduler": "K_EULER_ANCESTRAL", "num_images": 2}), Progress())
    assert np.array_equal(first, sdxl.generate(task(sdxl, SMALL), Progress()).pictures[0])


@pytest.mark.parametrize("payload", [SMALL, {**SMALL, "high_noise_frac": 0.7}, {**SMALL, "scheduler": "PNDM"}])
def test_progress_counts_every_step_of_both_models(sdxl: Sdxl, payload: dict[str, Any]) -> None:
    updates: list[Update] = []
    sdxl.generate(task(sdxl, payload), Progress(updates.append))
    denoise = [u for u in updates if u.stage == "denoise"]
    assert denoise[-1].step == denoise[-1].total
    assert [u.step for u in denoise] == list(range(denoise[-1].total + 1))


def test_cancel_ends_within_one_step(sdxl: Sdxl) -> None:
    steps: list[int] = []
    progress = Progress(lambda update: steps.append(update.step) or progress.cancelled.set())
    with pytest.raises(Cancelled):
        sdxl.generate(task(sdxl, SMALL), progress)
    assert max(steps) <= 1
