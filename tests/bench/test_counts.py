"""What a job does, as numbers that hold at any size: a change that makes jobs dearer fails here."""

import pytest

from bench.counts import count_encodes, count_experts, count_jobs

# A stage rests once its kept frames come out bit for bit as they were: how a processor rounds decides in which chunk.
ONE_RUN = 1


# Of 13 frames at 64 x 64. Layout svi_latent encodes two pictures alone; the end is decoded alone as well. The first
# encode of a shape is compared with the stock one: three runs where a second job has two.
SVI = {
    "text_encoder": 1,
    "transformer": 2,
    "transformer_2": 4,
    "vae.decoder": 5,
    "vae.encoder first stage": 3,
    "vae.encoder last stage": 3,
}


def calls(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if not name.startswith("load ")}


def test_svi_job_makes_six_forwards_and_remembers_its_prompt(twins):
    first, second = count_jobs("svi_endframe", twins)
    assert calls(first) == SVI
    assert calls(second) == {
        "transformer": 2,
        "transformer_2": 4,
        "vae.decoder": 5,
        "vae.encoder first stage": 2,
        "vae.encoder last stage": 2,
    }


def test_guided_phase_makes_two_forwards_a_step_and_the_other_one(twins):
    _, second = count_jobs("svi_endframe", twins, guidance_scale=3.0)
    assert (second["transformer"], second["transformer_2"]) == (4, 4)
    assert "text_encoder" not in second


def test_second_job_loads_nothing(twins):
    first, second = count_jobs("svi_endframe", twins)
    assert all(count == 1 for name, count in first.items() if name.startswith("load "))
    assert not [name for name in second if name.startswith("load ")]


def test_flf_encode_rests_where_the_film_stands_still(twins):
    """81 frames: 21 chunks, of which the first stage runs 4 once the shape is known to be right."""
    _, second = count_jobs("svi_endframe", twins, video_length=81, model_type="wan_2_2_i2v_lightning_svi_endframe")
    assert second["vae.encoder first stage"] == 4
    assert second["vae.encoder last stage"] == pytest.approx(18, abs=ONE_RUN)  # the twin has fewer stages
    assert (second["transformer"], second["transformer_2"]) == (2, 4)


def test_video_job_makes_two_forwards_a_step(twins):
    _, second = count_jobs("video", twins)
    assert second["transformer"] == 8
    assert "text_encoder" not in second
    assert "image_encoder" not in second


def test_image_job_makes_base_and_refiner_forwards(twins):
    _, second = count_jobs("image", twins)
    assert (second["unet"], second["refiner_unet"]) == (25, 15)
    assert not {"text_encoder", "text_encoder_2"} & second.keys()


def test_two_experts_of_40_blocks_share_one_graph_swap_and_are_repaired(twins):
    assert count_experts(twins) == {
        "graphs, first job": 1,
        "graphs, second job": 0,
        "experts moved, second job": 2.0,
        "experts moved, both resident": 0.0,
        "a fault broke the swap": True,
        "equal after the fault": True,
    }


def test_encode_of_81_frames_follows_the_stored_schedule(twins):
    """21 chunks; the twin has fewer stages than the real VAE, whose schedule tests/engine/test_memo_encode.py holds."""
    assert count_encodes(twins) == {
        "start": pytest.approx((3, 3, 3, 4, 5, 6, 6, 9, 15, 15), abs=ONE_RUN),
        "start and end": pytest.approx((4, 4, 4, 5, 6, 7, 7, 10, 15, 16), abs=ONE_RUN),
    }
