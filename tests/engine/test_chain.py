from dataclasses import replace

import pytest
import torch

from engine.chain import Wish, keep, motion_after, newest_frames, plan, returned_frames
from engine.conditioning import LAYOUTS, Given, condition
from engine.vae import encode_norm
from schemas.errors import InvalidInput
from tests.engine.operators import Operators
from tests.engine.svi_parts import noise, pixels, tiny_vae


def wish(frames, layout="svi_latent", **changes):
    return replace(Wish(frames, ("a cat",), 100, layout), **changes)


def refusal(*args, **changes):
    with pytest.raises(InvalidInput) as caught:
        plan(wish(*args, **changes))
    return [(problem.field, problem.message) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("layout", "policy", "latent_frames", "decoded", "returned"),
    [
        ("svi", "exact", 21, 81, 81),
        ("svi", "window", 21, 81, 81),
        ("svi_latent", "exact", 22, 82, 81),
        ("svi_latent", "window", 21, 78, 78),
        ("svi_upstream", "exact", 21, 81, 81),
        ("svi_upstream", "window", 21, 81, 81),
        ("svi_pixel4", "exact", 21, 81, 81),
        ("svi_pixel4", "window", 21, 81, 80),
        ("flf", "exact", 21, 81, 81),
        ("flf", "window", 21, 81, 81),
        ("kijai_end", "exact", 22, 82, 81),
        ("kijai_end", "window", 22, 82, 81),
    ],
)
def test_row_09_frames_of_81_in_every_layout_and_policy(layout, policy, latent_frames, decoded, returned):
    (clip,) = plan(wish(81, layout, policy=policy))

    assert clip.latent_frames == latent_frames
    assert clip.decoded_frames == decoded
    assert returned_frames((clip,)) == returned


@pytest.mark.parametrize(
    ("frames", "latent_frames", "exact", "window"),
    [(5, 3, 5, 2), (17, 6, 17, 14), (77, 21, 77, 74), (81, 22, 81, 78)],
)
def test_row_09_exact_returns_all_frames_and_window_three_fewer(frames, latent_frames, exact, window):
    (clip,) = plan(wish(frames))

    assert clip.latent_frames == latent_frames
    assert returned_frames((clip,)) == exact
    assert returned_frames(plan(wish(frames, policy="window"))) == window


def test_exact_leaves_out_the_frame_before_the_end_picture():
    (clip,) = plan(wish(17))

    assert clip.kept == (*range(16), 17)


def test_window_of_pixel4_leaves_out_the_start_and_of_kijai_end_the_end():
    (pixel4,) = plan(wish(17, "svi_pixel4", policy="window"))
    (kijai,) = plan(wish(17, "kijai_end", policy="window"))

    assert pixel4.kept == tuple(range(1, 17))
    assert kijai.kept == tuple(range(17))


@pytest.mark.parametrize(
    ("frames", "lengths"),
    [
        (5, [5]),
        (81, [81]),
        (85, [45, 45]),
        (157, [81, 81]),
        (161, [57, 57, 57]),
        (165, [61, 57, 57]),
        (233, [81, 81, 81]),
        (1221, [81] * 16),
    ],
)
def test_plan_divides_a_film_into_the_fewest_clips_of_about_equal_length(frames, lengths):
    assert [clip.frames for clip in plan(wish(frames))] == lengths


@pytest.mark.parametrize("layout", ["svi", "svi_latent", "svi_upstream"])
@pytest.mark.parametrize("overlap", [4, 8, 20])
def test_exact_hits_every_legal_total(layout, overlap):
    for frames in range(5, 600, 4):
        clips = plan(wish(frames, layout, overlap=overlap))

        assert returned_frames(clips) == frames
        assert max(clip.frames for clip in clips) <= 81


def test_window_returns_three_fewer_for_every_legal_total():
    for frames in range(5, 600, 4):
        assert returned_frames(plan(wish(frames, policy="window"))) == frames - 3


@pytest.mark.parametrize(("clips", "frames"), [(1, 81), (2, 157), (3, 233), (16, 1221)])
def test_row_19_join_of_full_clips_counts_81_plus_76_each(clips, frames):
    planned = plan(wish(frames))

    assert len(planned) == clips
    assert [len(clip.kept) for clip in planned] == [81] + [76] * (clips - 1)


def film(clips):
    """Decode a synthetic chain whose every frame carries its time, and join it.

    Time runs as the model renders it: a later clip shows the anchor (-1), then the motion latent's
    frames again, then goes on. The end picture is 1000.
    """
    joined, shown = [], -1
    for clip in clips:
        first = 0 if clip.drop == 0 else shown - 3
        counters = list(range(first, first + clip.decoded_frames))
        if clip.drop:
            counters = [-1, *counters[: clip.decoded_frames - 1]]
        if LAYOUTS[clip.layout].end_alone:
            counters[-1] = 1000
        video = torch.tensor(counters, dtype=torch.float32).view(1, 1, -1, 1, 1)
        alone = [1] if LAYOUTS[clip.layout].end_alone else []
        sizes = [1] + [4] * ((clip.decoded_frames - 1 - len(alone)) // 4) + alone
        kept = torch.cat(list(keep(torch.split(video, sizes, dim=2), clip.kept)), dim=2).flatten().tolist()
        joined += [int(counter) for counter in kept]
        shown = joined[-1]
    return joined


@pytest.mark.parametrize("frames", [81, 157, 161, 233, 389])
def test_row_19_seams_have_no_duplicate_and_no_gap(frames):
    assert film(plan(wish(frames, "svi"))) == list(range(frames))


@pytest.mark.parametrize("frames", [81, 161, 233])
def test_row_19_seams_before_an_end_picture_have_no_duplicate_and_no_gap(frames):
    assert film(plan(wish(frames))) == [*range(frames - 1), 1000]


def test_seam_check_notices_one_frame_too_few_dropped():
    first, second = plan(wish(157, "svi"))

    assert film((first, replace(second, drop=4))) != list(range(157))
    assert film((first, replace(second, drop=6))) != list(range(157))


def test_row_20_every_clip_has_its_own_seed():
    assert [clip.seed for clip in plan(wish(309))] == [100, 142, 184, 226]


def test_row_20_seeds_go_on_in_the_next_job():
    assert [clip.seed for clip in plan(wish(157, continues=True, first_index=3))] == [226, 268]


def test_row_21_only_the_last_clip_knows_the_end():
    assert [clip.layout for clip in plan(wish(309))] == ["svi", "svi", "svi", "svi_latent"]


def test_prompts_go_to_their_clips_and_the_last_one_holds():
    clips = plan(wish(309, prompts=("one", "two")))

    assert [clip.prompt for clip in clips] == ["one", "two", "two", "two"]


def test_film_that_goes_on_drops_the_shared_frames_of_its_first_clip():
    (clip,) = plan(wish(81, "svi", continues=True))

    assert clip.kept == tuple(range(5, 81))


def test_longer_overlap_drops_more_at_each_seam():
    clips = plan(wish(153, "svi", overlap=8))

    assert [len(clip.kept) for clip in clips] == [81, 72]


@pytest.mark.parametrize("layout", ["flf", "svi_pixel4", "kijai_end"])
def test_pixel_layouts_refuse_to_chain_and_name_those_that_do(layout):
    sentence = f"{layout} makes one clip of at most 81 frames; for more: svi, svi_latent, svi_upstream"

    assert refusal(85, layout) == [("layout", sentence)]


@pytest.mark.parametrize("layout", ["flf", "svi_pixel4", "kijai_end"])
def test_pixel_layouts_go_on_from_start_frames_without_an_anchor_to_drop(layout):
    (clip,) = plan(wish(81, layout, continues=True))

    assert clip.drop == 4


@pytest.mark.parametrize(("segments", "lengths"), [(2, [45, 41]), (3, [33, 29, 29])])
def test_segments_divide_the_film_into_more_clips_than_it_needs(segments, lengths):
    clips = plan(wish(81, segments=segments))

    assert [clip.frames for clip in clips] == lengths
    assert returned_frames(clips) == 81


def test_segments_that_cannot_be_are_refused_with_those_that_can():
    assert refusal(161, segments=2) == [("segments", "must be 3 to 39 for 161 frames, got 2")]
    assert refusal(17, segments=4) == [("segments", "must be 1 to 3 for 17 frames, got 4")]


def test_film_too_short_to_go_on_is_refused():
    assert refusal(5, continues=True)[0][0] == "video_length"
    assert returned_frames(plan(wish(9, continues=True))) == 4


@pytest.mark.parametrize("overlap", [0, 1, 5, 6])
def test_overlap_that_is_no_whole_number_of_latents_is_refused(overlap):
    assert refusal(161, overlap=overlap)[0][0] == "overlap"


def test_motion_after_an_open_clip_is_its_last_latent():
    (clip,) = plan(wish(17, "svi"))
    latents = noise(5)

    assert torch.equal(motion_after(clip, latents), latents[:, :, 4:5])
    assert torch.equal(motion_after(clip, latents, overlap=8), latents[:, :, 3:5])


def test_motion_after_a_single_picture_end_is_the_latent_before_it():
    (clip,) = plan(wish(17))
    latents = noise(6)

    assert torch.equal(motion_after(clip, latents), latents[:, :, 4:5])


@pytest.mark.parametrize(
    ("frames", "layout", "policy", "overlap", "needed"),
    [(5, "svi_latent", "window", 4, 9), (5, "svi", "exact", 8, 9), (9, "svi_latent", "exact", 12, 13)],
)
def test_clip_too_short_to_hand_over_is_refused_with_the_length_that_can(frames, layout, policy, overlap, needed):
    (clip,) = plan(wish(frames, layout, policy=policy))

    with pytest.raises(InvalidInput, match=f"return_state: needs a clip of at least {needed} frames, got {frames}"):
        motion_after(clip, noise(clip.latent_frames), overlap)
    (longer,) = plan(wish(needed, layout, policy=policy))
    assert motion_after(longer, noise(longer.latent_frames), overlap).shape[2] == overlap // 4


def test_row_18_motion_of_the_next_clip_equals_this_ones_last_latent():
    vae = tiny_vae()
    (clip,) = plan(wish(17, "svi"))
    latents = noise(5)
    given = Given(pixels(1), pixels(1), motion=motion_after(clip, latents))

    y = condition("svi", 5, given, lambda video: encode_norm(vae, video))

    assert torch.equal(y[:, 4:, 1:2], latents[:, :, -1:])
    assert y[:, :4, 1].abs().max() == 0.0


def test_row_22_prefix_of_eight_frames_is_refused():
    with pytest.raises(InvalidInput, match="prefix_video: has 8 frames; going on from it takes at least 9"):
        newest_frames(pixels(8))


def test_row_22_prefix_of_nine_frames_is_used_whole():
    assert torch.equal(newest_frames(pixels(9)), pixels(9))


def test_row_22_prefix_of_twelve_frames_gives_its_newest_nine():
    vae, video = tiny_vae(), pixels(12)

    latents = encode_norm(vae, newest_frames(video))[:, :, -1:]

    assert torch.equal(latents, encode_norm(vae, video[:, :, 3:])[:, :, -1:])
    # what the stock encoder would make of all twelve: the oldest nine
    oldest = encode_norm(vae, video[:, :, :9])[:, :, -1:]
    assert not torch.equal(latents, oldest)


def test_row_22_longer_overlap_needs_a_longer_prefix():
    assert newest_frames(pixels(20), overlap=8).shape[2] == 13
    with pytest.raises(InvalidInput, match="at least 13"):
        newest_frames(pixels(12), overlap=8)


def test_keep_passes_whole_chunks_on_untouched():
    chunks = [pixels(1), pixels(4, seed=1)]
    passed = list(keep(iter(chunks), range(5)))

    assert [chunk is original for chunk, original in zip(passed, chunks, strict=True)] == [True, True]


def test_keep_takes_some_frames_of_a_chunk_without_sending_their_numbers_anywhere():
    chunk = pixels(4)
    with Operators() as operators:
        (first, rest) = keep([chunk, chunk], [0, 2, 5, 6, 7])
    assert torch.equal(first, chunk[:, :, [0, 2]])
    assert torch.equal(rest, chunk[:, :, 1:])
    assert operators.called[torch.ops.aten.index.Tensor] == 0
    assert operators.called[torch.ops.aten.lift_fresh.default] == 0  # a tensor made of Python's numbers
