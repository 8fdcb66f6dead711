"""What is seen of a job from outside, on a CPU."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn

from bench.timing import Memory
from bench.watch import Sample, Watch, WatchedParts, sample
from engine.memo_encode import MemoEncoder
from tests.engine.tiny_wan import make_wan, wan_inputs

NOTHING = Memory(0.0, 0.0, 0.0, 0.0, 0.0)


class Parts:
    profile = "any"

    def load(self, name, device="cpu"):
        return AutoencoderKLWan(base_dim=8) if name == "vae" else nn.Linear(2, 2)


def test_watch_tells_every_call_once():
    watch, layer = Watch(), nn.Linear(2, 2)
    watch.follow("transformer", layer)
    for _ in range(3):
        layer(torch.zeros(1, 2))
    seen = watch.take()
    assert {name: len(calls) for name, calls in seen.items()} == {"transformer": 3}
    assert min(seen["transformer"]) > 0
    assert watch.take() == {}


def test_watched_parts_follow_models_and_leave_the_rest():
    watch = Watch()
    parts = WatchedParts(Parts(), watch)
    parts.load("transformer")(torch.zeros(1, 2))
    parts.load("tokenizer")(torch.zeros(1, 2))
    assert list(watch.take()) == ["transformer"]


@torch.inference_mode()
def test_encode_is_one_span_however_it_chunks():
    watch = Watch()
    vae = WatchedParts(Parts(), watch).load("vae")
    vae.encode(torch.zeros(1, 3, 13, 16, 16))
    MemoEncoder(vae, verify=False).encode(torch.zeros(1, 3, 13, 16, 16))
    vae.decode(torch.zeros(1, 16, 4, 2, 2))
    assert {name: len(calls) for name, calls in watch.take().items()} == {"vae.encode": 2, "vae.decode": 4}


def test_span_of_a_job_that_failed_is_not_the_next_ones():
    watch, layer = Watch(), nn.Linear(2, 2)
    watch.follow("unet", layer)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 3))
    layer(torch.zeros(1, 2))
    assert len(watch.take()["unet"]) == 1


def test_sample_counts_only_its_own_job_and_leaves_encoders_out_of_the_forwards():
    watch = Watch()
    parts = WatchedParts(Parts(), watch)
    encoder, transformer = parts.load("text_encoder"), parts.load("transformer")
    transformer(torch.zeros(1, 2))

    def job():
        encoder(torch.zeros(1, 2))
        transformer(torch.zeros(1, 2))
        transformer(torch.zeros(1, 2))
        return {"denoise": 0.5}

    one = sample(job, watch)
    assert one.stages_s == {"denoise": 0.5}
    assert (len(one.calls_s["text_encoder"]), len(one.forwards_s())) == (1, 2)
    assert one.seconds > sum(one.forwards_s())
    assert one.memory.host_mib > 100


def test_parts_of_a_job_add_up_to_it():
    calls = {"text_encoder": [0.5], "vae.encode": [1.0, 1.0], "transformer": [2.0, 2.0], "transformer_2": [3.0]}
    stages = {"load": 0.25, "load_read": 0.25, "encode": 0.75, "denoise": 9.5, "decode": 4.0}  # load_read is in load
    parts = Sample(16.0, stages, calls, 64, NOTHING).parts_s()
    assert parts == {
        "text": 0.5, "picture": 0.0, "encode": 2.0, "forwards": 7.0, "decode": 4.0, "load": 0.25, "fetch": 0.0,
        "upload": 0.0, "file": 1.5, "rest": 0.75,
    }  # fmt: skip
    assert sum(parts.values()) == 16.0


def test_decode_is_the_cards_own_time_where_the_decoder_was_seen():
    one = Sample(5.0, {"decode": 4.0}, {"vae.decode": [1.0, 2.0]}, 0, NOTHING)
    assert one.parts_s()["decode"] == 3.0


def test_watch_reads_the_tokens_off_the_forward():
    watch, model = Watch(), make_wan(0)
    watch.follow("transformer", model)
    with torch.no_grad():
        model(**wan_inputs(height=12))
    assert watch.tokens == 24  # 2 latent frames of 12 x 4, patches of 1 x 2 x 2
