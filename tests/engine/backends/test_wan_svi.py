import gc
import threading
import weakref
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline

from engine.backends import Task, wan_svi
from engine.backends.wan_svi import WanSvi
from engine.card import Card
from engine.experts import RollingExperts
from engine.frames import to_uint8
from engine.lora import LoraWeights, LowRank, merge
from engine.profile import Lora, Profile
from engine.profiles import PROFILES
from engine.progress import Progress, Update
from engine.scheduler import ReferenceEuler
from engine.vae import decode_chunks, encode_norm
from schemas.errors import Cancelled, InvalidInput
from schemas.input_schema import parse_request
from tests.engine.svi_parts import picture, tiny_text_encoder, tiny_tokenizer, tiny_transformer, tiny_vae

SVI = replace(PROFILES["wan_2_2_i2v_lightning_svi_3_3"], min_side=32)
FLF = replace(PROFILES["wan_2_2_i2v_lightning_svi_endframe"], min_side=32)
START, END, OTHER = picture(1, 32, 32), picture(2, 32, 32), picture(3, 32, 32)
BOTH = {"image_start": START, "image_end": END}


class TinyParts:
    """A profile's parts, made on the spot; every load makes anew, as the real ones do."""

    def __init__(self, profile: Profile = SVI, dtype: torch.dtype = torch.float32) -> None:
        self.profile = profile
        self._make = {
            "vae": tiny_vae,
            "tokenizer": tiny_tokenizer,
            "text_encoder": tiny_text_encoder,
            "transformer": lambda: tiny_transformer(1, dtype),
            "transformer_2": lambda: tiny_transformer(2, dtype),
        }

    def load(self, name: str, device: str = "cpu") -> Any:
        return self._make[name]()


@pytest.fixture(scope="module")
def backend() -> WanSvi:
    return WanSvi(SVI, TinyParts(), Card("cpu", 2**40))


def task(pictures=BOTH, seed=7, profile=SVI, **fields) -> Task:
    texts = {name: ["data:,x"] if name == "image_refs" else "data:,x" for name in pictures}
    payload = {
        "mode": "svi_endframe", "prompt": "a red fox", "resolution": "32x32", "video_length": 17, **texts, **fields,
    }  # fmt: skip
    return Task(profile, parse_request(payload), seed, pictures)


def run(backend, *args, progress=None, **fields) -> np.ndarray:
    frames = backend.generate(task(*args, **fields), progress or Progress())
    video = np.concatenate(list(frames.chunks))
    assert video.shape == (*frames.shape, 3)
    assert video.dtype == np.uint8
    return video


def calls_of(backend) -> list[str]:
    """The experts of a backend from now on, one letter a forward."""
    seen: list[str] = []
    for name, letter in (("high", "H"), ("low", "L")):
        backend._placed.experts._models[name].register_forward_pre_hook(lambda *_, letter=letter: seen.append(letter))
    return seen


def decoded_alone(image) -> np.ndarray:
    """One picture through the VAE and back."""
    vae = tiny_vae()
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 255.0).permute(2, 0, 1)[None, :, None]
    (chunk,) = decode_chunks(vae, encode_norm(vae, 2.0 * pixels - 1.0))
    return to_uint8(chunk[0])[0]


@pytest.mark.parametrize(
    ("frames", "policy", "returned"),
    [
        (81, "exact", 81),
        (77, "exact", 77),
        (5, "exact", 5),
        (161, "exact", 161),
        (81, "window", 78),
        (161, "window", 158),
    ],
)
def test_frames_asked_and_returned_and_row_10_the_last_one_is_the_end_picture(backend, frames, policy, returned):
    video = run(backend, video_length=frames, frame_policy=policy)

    assert len(video) == returned
    assert np.array_equal(video[-1], decoded_alone(END))


def test_row_10_without_lock_the_last_frame_depends_on_the_sampler(backend):
    first, second = (run(backend, seed=seed, lock_end=False) for seed in (7, 8))

    assert not np.array_equal(first[-1], decoded_alone(END))
    assert not np.array_equal(first[-1], second[-1])


def test_row_10_lock_changes_the_last_frame_only(backend):
    locked, free = run(backend), run(backend, lock_end=False)

    assert np.array_equal(locked[:-1], free[:-1])
    assert not np.array_equal(locked[-1], free[-1])


@pytest.mark.parametrize("layout", ["svi_latent", "svi_upstream", "svi_pixel4", "flf", "kijai_end"])
def test_every_end_layout_returns_what_was_asked_and_follows_its_end(backend, layout):
    video = run(backend, layout=layout)
    other = run(backend, {"image_start": START, "image_end": OTHER}, layout=layout)

    assert len(video) == 17
    assert not np.array_equal(video[-1], other[-1])


def test_layout_svi_runs_without_an_end(backend):
    assert len(run(backend, {"image_start": START}, layout="svi")) == 17


@pytest.mark.parametrize(("layout", "returned"), [("svi_pixel4", 16), ("kijai_end", 17), ("flf", 17)])
def test_window_returns_what_the_layouts_origin_does(backend, layout, returned):
    assert len(run(backend, layout=layout, frame_policy="window")) == returned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flf_equals_the_whole_stock_pipeline_with_last_image(dtype, monkeypatch):
    backend = WanSvi(FLF, TinyParts(FLF, dtype), Card("cpu", 2**40))
    pipeline = WanImageToVideoPipeline(
        tokenizer=tiny_tokenizer(), text_encoder=tiny_text_encoder(), vae=tiny_vae(),
        transformer=tiny_transformer(1, dtype), transformer_2=tiny_transformer(2, dtype),
        scheduler=ReferenceEuler(shift=5.0), boundary_ratio=0.883,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        image=START, last_image=END, prompt="a red fox", height=32, width=32, num_frames=17, num_inference_steps=6,
        guidance_scale=1.0, guidance_scale_2=1.0, generator=torch.Generator("cpu").manual_seed(7), output_type="pt",
    ).frames[0]  # fmt: skip

    monkeypatch.setattr("engine.backends.wan_svi.stream_uint8", lambda chunks: chunks)
    frames = backend.generate(task(profile=FLF, layout="flf", guidance_scale=1.0), Progress())
    ours = torch.cat(list(frames.chunks), dim=1).transpose(0, 1)

    assert torch.equal((ours / 2 + 0.5).clamp(0, 1), stock)


def test_profile_decides_experts_and_guidance(backend):
    seen = calls_of(backend)
    run(backend)
    assert "".join(seen) == "HHLLLL"

    seen.clear()
    run(backend, profile=FLF, model_type=FLF.name)
    assert "".join(seen) == "HHHHLLLL"


@pytest.mark.parametrize(
    ("fields", "calls"),
    [
        ({"guidance_scale": 3.0}, "HHHHLLLL"),
        ({"guidance2_scale": 3.0}, "HHLLLLLLLL"),
        ({"switch_threshold": 875.0}, "HHHLLL"),
        ({"high_steps": 1, "low_steps": 3}, "HLLL"),
        ({"num_inference_steps": 8}, "HHHLLLLL"),
        ({"flow_shift": 8.0}, "HHHLLL"),
    ],
)
def test_request_decides_over_the_profile(backend, fields, calls):
    seen = calls_of(backend)
    run(backend, **fields)

    assert "".join(seen) == calls


def test_split_without_an_expert_is_refused_before_anything_runs(backend):
    seen = calls_of(backend)

    with pytest.raises(InvalidInput, match="switch_threshold: 2 gives 6 high"):
        run(backend, switch_threshold=2.0)
    assert seen == []


def test_prompts_are_encoded_once_and_the_negative_one_only_for_guidance():
    parts = TinyParts()
    encoder, encoded = tiny_text_encoder(), []
    encoder.register_forward_pre_hook(lambda *_: encoded.append(1))
    parts._make["text_encoder"] = lambda: encoder
    backend = WanSvi(SVI, parts, Card("cpu", 2**40))

    run(backend)
    assert len(encoded) == 1
    run(backend)
    assert len(encoded) == 1
    run(backend, guidance_scale=3.0)
    assert len(encoded) == 2


def test_pictures_are_encoded_before_words_and_each_clips_noise_is_there_before_its_pictures(backend, monkeypatch):
    """The card is at work on pictures while Python launches the text encoder; a copy to it waits for what it does."""
    order: list[str] = []

    def told(name, function):
        return lambda *args: order.append(name) or function(*args)

    monkeypatch.setattr(backend, "_draw", told("noise", backend._draw))
    monkeypatch.setattr(backend, "_encode", told("picture", backend._encode))
    monkeypatch.setattr(backend, "_embed", told("words", backend._embed))
    run(backend, video_length=21, segments=2)
    assert order == ["noise", "picture", "words", "noise", "picture", "picture"]


def test_guided_run_reads_the_negative_prompt(backend):
    fields = {"guidance_scale": 3.0}

    assert not np.array_equal(run(backend, **fields), run(backend, negative_prompt="deep snow", **fields))


def chain_of_three(backend, **fields):
    """The chain as three jobs, each but the last handing its state to the next."""
    text, films = None, []
    for i, prompt in enumerate(("a red fox", "deep snow", "a fox")):
        end = {} if i < 2 else {"image_end": END}
        job = task(
            {"image_start": START, **end}, prompt=prompt, video_length=81, layout="svi_latent" if end else "svi",
            return_state=i < 2, **({"state": text} if text else {}), **fields,
        )  # fmt: skip
        frames = backend.generate(job, Progress())
        films.append(np.concatenate(list(frames.chunks)))
        text = frames.state()
    return np.concatenate(films)


def test_three_clip_chain_equals_three_jobs_by_state(backend):
    prompts = ["a red fox", "deep snow", "a fox"]
    texts = {"image_start": "data:,x", "image_end": "data:,x"}
    request = parse_request(
        {"mode": "svi_endframe", "resolution": "32x32", "video_length": 233, "prompts": prompts, **texts}
    )
    whole = np.concatenate(list(backend.generate(Task(SVI, request, 7, BOTH), Progress()).chunks))

    assert len(whole) == 233
    assert np.array_equal(whole, chain_of_three(backend))


def test_chain_through_a_state_is_another_one_with_another_seed(backend):
    first = backend.generate(task({"image_start": START}, layout="svi", return_state=True), Progress())
    fields = {"layout": "svi", "state": first.state()}

    same, again, other = (run(backend, {"image_start": START}, seed=seed, **fields) for seed in (7, 7, 8))

    assert np.array_equal(same, again)
    assert not np.array_equal(same, other)


def test_state_of_a_video_too_short_for_it_is_refused_before_anything_runs(backend):
    seen = calls_of(backend)

    with pytest.raises(InvalidInput, match="return_state: needs a clip of at least 9 frames, got 5"):
        run(backend, video_length=5, frame_policy="window", return_state=True)
    assert seen == []
    assert len(run(backend, video_length=5, frame_policy="window")) == 2


def test_row_20_every_clip_starts_from_the_noise_of_its_own_seed():
    backend = WanSvi(SVI, TinyParts(), Card("cpu", 2**40))
    starts: list[torch.Tensor] = []

    def remember(_module, _args, inputs):
        if inputs["timestep"].item() == 1000.0:
            starts.append(inputs["hidden_states"][:, :16])

    backend._placed.experts._models["high"].register_forward_pre_hook(remember, with_kwargs=True)
    run(backend, {"image_start": START}, layout="svi", video_length=161)

    for start, seed in zip(starts, (7, 49, 91), strict=True):
        expected = torch.randn(1, 16, 15, 4, 4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(start, expected)


def test_state_is_returned_only_when_asked_for(backend):
    assert backend.generate(task(), Progress()).state() is None


def test_state_decides_the_size_and_refuses_another(backend):
    first = backend.generate(task({"image_start": START}, layout="svi", return_state=True), Progress())
    payload = {"mode": "svi_endframe", "layout": "svi", "image_start": "data:,x", "state": first.state()}
    wide = {"image_start": picture(1, 32, 64)}

    frames = backend.generate(Task(SVI, parse_request(payload), 7, wide), Progress())
    assert frames.shape == (76, 32, 32)

    with pytest.raises(InvalidInput, match="state: holds 1 latents of 32x32; this job goes on from 1 latents of 48x32"):
        backend.generate(Task(SVI, parse_request({**payload, "resolution": "48x32"}), 7, wide), Progress())


def test_notes_tell_a_changed_anchor_and_seed(backend):
    first = backend.generate(task({"image_start": START}, layout="svi", return_state=True), Progress())
    later = backend.generate(task({"image_start": OTHER}, seed=9, layout="svi", state=first.state()), Progress())

    assert later.notes == (
        "the state's chain has seed 7; this video goes on with seed 9",
        "the anchor is not the one of the state's chain",
    )


def test_notes_tell_of_a_latent_frame_more_than_trained(backend):
    frames = backend.generate(task(video_length=81), Progress())

    assert frames.notes == (
        "81 frames in layout svi_latent take 22 latent frames, and the model was trained on 21; 77 frames stay within",
    )
    assert backend.generate(task(video_length=77), Progress()).notes == ()


def test_notes_tell_of_a_prompt_longer_than_the_model_reads(backend):
    frames = backend.generate(task(prompt="fox " * 600), Progress())

    assert frames.notes == ("the prompt of clip 0 is 601 tokens long; the model reads the first 512",)


def test_notes_repeat_the_profiles_corrections(backend):
    profile = replace(SVI, settings={**SVI.settings, "corrections": ("a number was wrong",)})

    assert backend.generate(task(profile=profile), Progress()).notes == ("a number was wrong",)


def test_prefix_video_gives_motion_to_the_latent_layouts(backend):
    past, other = ([picture(seed, 32, 32) for seed in range(base, base + 12)] for base in (10, 40))
    pictures = {"image_start": START, "prefix_video": past}

    video = run(backend, pictures, layout="svi")

    assert len(video) == 12
    assert np.array_equal(video, run(backend, {**pictures, "prefix_video": past[3:]}, layout="svi"))
    assert not np.array_equal(video, run(backend, {**pictures, "prefix_video": other}, layout="svi"))


def test_prefix_video_of_eight_frames_is_refused(backend):
    with pytest.raises(InvalidInput, match="at least 9"):
        run(backend, {"image_start": START, "prefix_video": [START] * 8}, layout="svi")


def test_prefix_video_gives_start_frames_to_the_pixel_layouts(backend):
    past = [picture(seed, 32, 32) for seed in range(10, 19)]
    pictures = {**BOTH, "prefix_video": past}

    video = run(backend, pictures, layout="svi_pixel4")

    assert len(video) == 13
    assert np.array_equal(video, run(backend, {**pictures, "image_start": OTHER}, layout="svi_pixel4"))
    changed = [*past[:-1], OTHER]
    assert not np.array_equal(video, run(backend, {**pictures, "prefix_video": changed}, layout="svi_pixel4"))


def test_several_start_frames_are_taken_by_flf(backend):
    starts = [picture(seed, 32, 32) for seed in (1, 4, 5)]
    payload = {
        "mode": "svi_endframe", "layout": "flf", "resolution": "32x32", "video_length": 17,
        "image_start": ["data:,a", "data:,b", "data:,c"], "image_end": "data:,x",
    }  # fmt: skip
    job = Task(SVI, parse_request(payload), 7, {"image_start": starts, "image_end": END})

    video = np.concatenate(list(backend.generate(job, Progress()).chunks))

    assert len(video) == 17
    assert not np.array_equal(video, run(backend, layout="flf", prompt=""))


def test_latent_layout_starts_on_the_anchor_and_pixel_layout_on_the_start(backend):
    pictures = {**BOTH, "image_refs": [OTHER]}

    for layout, decides in (("svi_latent", "image_refs"), ("flf", "image_start")):
        video = run(backend, pictures, layout=layout)
        other = {"image_refs": {"image_start": picture(9, 32, 32)}, "image_start": {"image_refs": [picture(9, 32, 32)]}}
        assert np.array_equal(video, run(backend, {**pictures, **other[decides]}, layout=layout))


def test_size_comes_from_the_starts_aspect(backend):
    profile = replace(SVI, max_area=48 * 96)
    payload = {"mode": "svi_endframe", "image_start": "data:,x", "image_end": "data:,x", "video_length": 5}
    wide = {"image_start": picture(1, 64, 128), "image_end": END}

    frames = backend.generate(Task(profile, parse_request(payload), 7, wide), Progress())

    assert frames.shape == (5, 48, 96)


def test_size_below_the_models_smallest_side_is_refused(backend):
    with pytest.raises(InvalidInput, match="resolution: must have sides of at least 256, got 32x32"):
        run(backend, profile=replace(SVI, min_side=256))


@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_failed_job_leaves_no_trace_in_the_next(stop_after):
    alone = run(WanSvi(SVI, TinyParts(), Card("cpu", 2**40)), svi2pro=False)
    backend = WanSvi(SVI, TinyParts(), Card("cpu", 2**40))
    cancelled = threading.Event()

    def stop(update: Update) -> None:
        if update.stage == "denoise" and update.step == stop_after:
            cancelled.set()

    with pytest.raises(Cancelled):
        backend.generate(task(svi2pro=True, guidance_scale=3.0), Progress(stop, cancelled=cancelled))

    assert np.array_equal(run(backend, svi2pro=False), alone)


def test_job_abandoned_in_the_middle_of_its_decode_leaves_no_trace_in_the_next(backend):
    alone = run(backend, svi2pro=False)
    first = backend.generate(task(svi2pro=True), Progress())
    next(first.chunks)

    second = backend.generate(task(svi2pro=False), Progress())
    half = [next(second.chunks)]
    next(first.chunks)
    rest = list(second.chunks)

    assert np.array_equal(np.concatenate(half + rest), alone)


def test_progress_runs_over_the_whole_chain(backend):
    updates: list[Update] = []
    run(backend, {"image_start": START}, layout="svi", video_length=161, progress=Progress(updates.append))

    denoise = [(update.step, update.total) for update in updates if update.stage == "denoise"]
    assert denoise == [(step, 18) for step in range(19)]
    assert [update.percent for update in updates] == sorted(update.percent for update in updates)
    decode = [update for update in updates if update.stage == "decode"]
    assert (decode[-1].step, decode[-1].total) == (45, 45)


def test_experts_that_take_turns_on_the_card_give_the_same_bytes(backend):
    rolling = WanSvi(SVI, TinyParts(), Card("cpu", 2**40))
    taking_turns = RollingExperts(dict(rolling._placed.experts._models), "cpu")
    rolling._placed = replace(rolling._placed, experts=taking_turns)
    fields = {"video_length": 161, "guidance_scale": 3.0}

    assert np.array_equal(run(rolling, **fields), run(backend, **fields))


def test_unload_lets_go_of_every_model():
    parts, models = TinyParts(), []
    for name in ("vae", "text_encoder", "transformer", "transformer_2"):

        def make(make=parts._make[name]):
            models.append(weakref.ref(made := make()))
            return made

        parts._make[name] = make
    backend = WanSvi(SVI, parts, Card("cpu", 2**40))
    run(backend)
    gc.collect()
    assert all(model() is not None for model in models)

    backend.unload()

    gc.collect()
    assert [model() for model in models] == [None] * 4


class PartsWithLoras(TinyParts):
    """Parts whose bake merged the LoRAs at some strengths and kept the files: one module of a block each."""

    NAME = "blocks.0.ffn.net.2.weight"
    keeps_loras = True

    def __init__(self, strengths: dict[str, float]) -> None:
        super().__init__()
        self._strengths = strengths

    def load(self, name: str, device: str = "cpu") -> Any:
        model = super().load(name, device)
        expert = {"transformer": "high", "transformer_2": "low"}.get(name)
        mine = [(self.load_lora(lora), self._strengths[lora.file]) for lora in SVI.loras if lora.expert == expert]
        if mine:
            weight = model.get_parameter(self.NAME)
            weight.data = merge(weight.data, self.NAME, mine)
        return model

    def load_lora(self, lora: Lora) -> LoraWeights:
        generator = torch.Generator().manual_seed(zlib.crc32(lora.file.encode()))
        down, up = torch.randn(2, 32, generator=generator), torch.randn(24, 2, generator=generator)
        return LoraWeights(lora.file, "", {self.NAME: LowRank(down, up, 0.1)}, {self.NAME: self.NAME})


BAKED = {lora.file: lora.strength for lora in SVI.loras}


def test_lora_strengths_of_a_request_equal_a_bake_at_those_strengths_and_leave_no_trace():
    asked = dict(zip(BAKED, (1.0, 1.0, 0.5, 2.0), strict=True))
    expected = run(WanSvi(SVI, PartsWithLoras(asked), Card("cpu", 2**40)))
    backend = WanSvi(SVI, PartsWithLoras(BAKED), Card("cpu", 2**40))
    before = run(backend)

    got = run(backend, loras_multipliers="1;0 0;1 0.5;0 0;2")

    assert np.abs(got.astype(int) - expected).max() <= 1  # a level: the products are summed in another order
    assert np.abs(got.astype(int) - before).max() > 1
    assert np.array_equal(run(backend), before)


def test_lora_of_the_high_expert_can_be_lent_to_the_low_one():
    backend = WanSvi(SVI, PartsWithLoras(BAKED), Card("cpu", 2**40))

    assert not np.array_equal(run(backend, loras_multipliers="1;1 0;1 1.2;0 0;1"), run(backend))


def test_lora_strengths_equal_to_the_baked_ones_change_nothing(backend):
    assert np.array_equal(run(backend, loras_multipliers="1;0 0;1 1.2;0 0;1"), run(backend))


def test_lora_strengths_are_refused_where_the_files_were_not_kept(backend):
    with pytest.raises(InvalidInput, match="loras_multipliers: must be left out"):
        run(backend, loras_multipliers="1;0 0;1 0.5;0 0;1")


def test_frames_are_decoded_without_gradients_and_leave_the_readers_mode_alone(backend):
    frames = backend.generate(task(video_length=5), Progress())
    next(frames.chunks)

    assert not torch.is_inference_mode_enabled()


def test_clips_in_tiles_step_at_each_chunk_of_each_tile(backend):
    """A tile of a whole clip is long: a cancel is looked at, and the watch on steps is told, while it is decoded."""
    seen: list[Update] = []
    run_again = replace(task(resolution="288x32", video_length=29, segments=2), saves_memory=True)
    frames = backend.generate(run_again, Progress(seen.append))
    assert sum(len(chunk) for chunk in frames.chunks) == 29
    steps = [update for update in seen if update.stage == "decode"]
    assert [update.step for update in steps] == list(range(len(steps)))
    assert steps[-1].step == steps[-1].total == 2 * (5 + 6)  # tiles, latent frames of both clips


def test_cancel_ends_a_clip_in_tiles_before_its_first_frame(backend):
    cancelled = threading.Event()

    def send(update: Update) -> None:
        if (update.stage, update.step) == ("decode", 1):
            cancelled.set()

    run_again = replace(task(resolution="288x32"), saves_memory=True)
    frames = backend.generate(run_again, Progress(send, cancelled=cancelled))
    with pytest.raises(Cancelled):
        next(frames.chunks)


def test_films_encoder_is_imported_while_the_forwards_run(backend, monkeypatch):
    seen = list[str]()
    monkeypatch.setattr(wan_svi, "import_module", seen.append)
    run(backend, progress=Progress(lambda update: seen.append(update.stage)))
    assert list(dict.fromkeys(seen)) == ["encode", "denoise", "av", "decode"]


def test_job_ends_for_the_compiler_when_its_frames_are_decoded(backend, monkeypatch):
    seen = list[str]()
    monkeypatch.setattr(backend._placed, "end_job", lambda: seen.append("end"))
    run(backend, progress=Progress(lambda update: seen.append(update.stage)))
    assert list(dict.fromkeys(seen)) == ["encode", "denoise", "decode", "end"]


def test_decoder_is_prepared_beside_the_forwards(backend, monkeypatch):
    seen = list[str]()
    monkeypatch.setattr(backend._placed, "forwards_begin", lambda: seen.append("decoder"))
    run(backend, progress=Progress(lambda update: seen.append(update.stage)))
    assert list(dict.fromkeys(seen))[:3] == ["encode", "decoder", "denoise"]
