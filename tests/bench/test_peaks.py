"""Peaks are told by the span they fall into."""

import torch
from torch import nn

from bench.peaks import PeakWatch, measure
from engine.progress import Update
from engine.settings import Settings


def test_each_peak_belongs_to_the_span_it_was_read_in():
    readings = iter([(n, 10 * n) for n in range(1, 20)])
    watch = PeakWatch(lambda: next(readings))
    encoder, model = nn.Linear(2, 2), nn.Linear(2, 2)
    watch.follow("text_encoder", encoder)
    watch.follow("transformer_2", model)
    watch.hear(Update("encode", 0, 1, 0.0, None))
    encoder(torch.zeros(1, 2))
    watch.hear(Update("denoise", 0, 2, 0.0, None))
    for _ in range(2):
        model(torch.zeros(1, 2))
        watch.hear(Update("denoise", 1, 2, 50.0, None))  # a step is no new stage
    assert watch.take_peaks() == {
        "load": (1, 10), "encode": (2, 20), "text_encoder": (3, 30), "encode, after text_encoder": (4, 40),
        "denoise": (5, 50), "forward": (8, 80), "denoise, after forward": (9, 90),
    }  # fmt: skip
    assert watch.take_peaks() == {"load": (10, 100)}


def test_peaks_of_a_layout_are_those_of_its_first_and_last_job(twins):
    peaks = measure("svi_endframe", Settings(weights_dir=twins, precision="bf16"), twins, ["flf"], is_small=True)
    spans = [
        "load", "encode", "vae.encode", "encode, after vae.encode", "text_encoder", "encode, after text_encoder",
        "denoise", "forward", "denoise, after forward", "decode",
    ]  # fmt: skip
    told = [(peak.job, peak.span) for peak in peaks if "vae.decode" not in peak.span]
    assert told == [(job, span) for job in ("first", "later") for span in spans]
    assert {peak.forwards for peak in peaks if peak.job == "later"} == {"compiled"}
