"""Clocks and counters of the benchmark, on a CPU."""

import torch
from torch import nn

from bench.timing import Watch, WatchedParts, copied_bytes, sample
from tests.engine.tiny_wan import make_wan, wan_inputs


class Parts:
    profile = "any"

    def load(self, name, device="cpu"):
        return nn.Linear(2, 2)


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
    parts.load("vae")(torch.zeros(1, 2))
    assert list(watch.take()) == ["transformer"]


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


def test_watch_reads_the_tokens_off_the_forward():
    watch, model = Watch(), make_wan(0)
    watch.follow("transformer", model)
    with torch.no_grad():
        model(**wan_inputs(height=12))
    assert watch.tokens == 24  # 2 latent frames of 12 x 4, patches of 1 x 2 x 2


def test_copied_bytes_counts_what_goes_to_the_card():
    events = [
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "args": {"bytes": 1000}},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pageable -> Device)", "args": {"bytes": 24}},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pageable)", "args": {"bytes": 512}},
        {"cat": "kernel", "name": "gemm HtoD", "args": {}},
    ]
    assert copied_bytes({"traceEvents": events}) == 1024
