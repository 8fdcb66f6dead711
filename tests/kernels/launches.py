"""Launch for a Hopper that is not there what self-tests and jobs launch, and say what became of it: a line of JSON.

    python -m tests.kernels.launches IMAGE FOLDER

IMAGE: what builder/compile_kernels.py wrote. FOLDER: where a worker keeps kernels. A job's tensors are on the meta
device: of a job's size, and of no memory. Its products and its attention to itself are torch's.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from engine import (
    attention,
    attention8_triton,
    attention16_triton,
    attention_check,
    block8,
    rounding,
    rounding_triton,
    text_attention,
    text_attention_triton,
    widening,
)
from engine.absent_card import AbsentCard
from engine.eight_bits import to_eight_bits
from engine.fast_decode import FastDecoder
from engine.image_kernels import lend
from engine.parts import run_dtype
from engine.passes_triton import TRITON
from engine.profiles import PROFILES
from engine.published import published_model
from engine.settings import keep_kernels

TOKENS, PICTURE_TOKENS = 32_760, 257  # of 832x480x81, and of the picture beside its text
LATENTS = (1, 16, 4, 60, 104)  # a first chunk, one of two, one of one


class CountingCard(AbsentCard):
    def __init__(self) -> None:
        super().__init__((9, 0))
        self.starts = 0

    def launcher_cls(self, _source: Any, _metadata: Any) -> Callable[..., None]:
        def start(*_: Any) -> None:
            self.starts += 1

        return start


def launch_on_card(module: ModuleType, of: ModuleType, *names: str) -> None:
    """What `module` calls goes to the card's functions, though its tensors are on none."""
    for name in names:
        setattr(module, name, getattr(of, name))


def roundings() -> None:
    rounding._rows_snr_db("cpu")
    rounding._gelu_snr_db("cpu")


def text() -> None:
    text_attention._rounded_snr_db("cpu")
    for repeated_from in text_attention.TEST_TEXTS:
        text_attention._relative_error("cpu", *repeated_from)
    text_attention._hides_a_nan("cpu")


def wide_weights() -> None:
    with mock.patch("torch.equal", return_value=True):  # else it ends at the first width
        for format_ in (torch.int8, torch.float8_e4m3fn):
            widening._gives_torchs_bits(torch.device("cpu"), format_)


def attention_to_itself() -> None:
    shapes = [(tokens, keys, heads) for tokens, keys, heads, _ in attention.SHAPES]
    drawn = [[torch.zeros(n, heads, 128).bfloat16() for n in (tokens, keys)] for tokens, keys, heads in shapes]
    drawn.append([x[0] for x in attention_check.heads_of_every_way("cpu")[:2]])
    for query, key in drawn:
        attention16_triton.reach_of(query, key)
        attention8_triton.round_queries(query)
        attention8_triton.round_keys(key)


def block(profile: str, picture_tokens: int) -> None:
    """One of a transformer's, of which all are alike."""
    component = replace(PROFILES[profile].component("transformer"), dtype="fp8")
    model = published_model(component)
    del model.blocks[1:]
    to_eight_bits(model, component, "fp8")
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(run_dtype(component, name, "cuda"))
    attention.install(model, "native")
    assert block8.install(model, "cuda") == ()

    def given(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    angles = given(1, TOKENS, 1, 128, dtype=torch.float32)
    seen = given(1, picture_tokens + attention.TEXT_TOKENS, 5120)
    with torch.inference_mode():
        model.blocks[0](
            given(1, TOKENS, 5120), seen, given(1, 6, 5120, dtype=torch.float32), rotary_emb=(angles, angles)
        )


def decode() -> None:
    vae = published_model(PROFILES["wan22_i2v_svi"].component("vae"))
    for _ in FastDecoder(vae, torch.bfloat16, TRITON).decode(torch.empty(LATENTS, dtype=torch.bfloat16, device="meta")):
        pass


def of_another_width() -> None:
    rounding_triton.plain_round(torch.zeros(2, 5136).bfloat16())


LAUNCHES: dict[str, Callable[[], None]] = {
    "self-test of rounding": roundings,
    "self-test of attention to a text": text,
    "self-test of widening": wide_weights,
    "self-tests of attention": attention_to_itself,
    "block of a job": lambda: block("wan22_i2v_svi", 0),
    "block of a job with a picture": lambda: block("wan21_i2v_480p", PICTURE_TOKENS),
    "decode of a job": decode,
    "another width": of_another_width,
}


def main() -> None:
    image, folder = map(Path, sys.argv[1:])
    keep_kernels(folder)
    lend(image, folder)
    card = CountingCard()
    triton.runtime.driver.set_active(card)
    fused = ("plain_round", "gelu_round", "norm_round", "add_norm_round", "norm_rotate", "add_gated")
    for module in (rounding, block8):
        launch_on_card(module, rounding_triton, *fused)
    for module in (text_attention, block8):
        launch_on_card(module, text_attention_triton, "attend_text_round")
    launch_on_card(text_attention, text_attention_triton, "attend_text")
    for proof in (rounding, text_attention):
        proof.problem = lambda _device: None
    told = {}
    for name, launch in LAUNCHES.items():
        kept, starts = compiled(folder), card.starts
        launch()
        told[name] = [card.starts - starts, compiled(folder) - kept]
    print(json.dumps(told))  # noqa: T201


def compiled(folder: Path) -> int:
    """How many kernels have been compiled into it; of those that came with the image it has a list only."""
    return len(list((folder / "triton").glob("*/*.cubin")))


if __name__ == "__main__":
    main()
