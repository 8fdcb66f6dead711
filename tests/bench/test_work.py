"""The counted work is what torch counts over the published models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import work
from engine.profiles import PROFILES
from engine.published import published_model


@pytest.mark.filterwarnings("ignore:.*kept in float32")
@pytest.mark.parametrize(("profile", "image_tokens"), [("wan22_i2v_svi", 0), ("wan21_i2v_480p", 257)])
def test_forward_work_is_what_torch_counts(profile, image_tokens):
    model = published_model(PROFILES[profile].component("transformer")).to("meta")
    given = {
        "hidden_states": torch.empty(1, 36, 21, 60, 104, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(1, 512, 4096, device="meta"),
    }
    if image_tokens:
        given["encoder_hidden_states_image"] = torch.empty(1, image_tokens, 1280, device="meta")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(**given)
    assert counted.get_total_flops() == work.forward_work(32_760, image_tokens=image_tokens).total


def test_forward_work_has_the_published_figures():
    forward = work.forward_work(32_760)
    assert round(forward.total / work.TERA, 1) == 1678.4
    assert round(forward.self_attention / work.TERA, 1) == 879.2


def test_floor_is_the_sum_of_both_kinds_of_work():
    forward = work.Forward(linear=10.0, self_attention=6.0, cross_attention=2.0)
    assert forward.floor_s(linear_rate=5.0, attention_rate=4.0) == 4.0


def test_vae_work_is_what_torch_counts():
    vae = published_model(PROFILES["wan22_i2v_svi"].component("vae")).to("meta")
    with FlopCounterMode(display=False) as encode, torch.no_grad():
        vae.encode(torch.empty(1, 3, 81, 480, 832, device="meta"))
    with FlopCounterMode(display=False) as decode, torch.no_grad():
        vae.decode(torch.empty(1, 16, 21, 60, 104, device="meta"))
    assert encode.get_total_flops() == pytest.approx(work.VAE_ENCODE, rel=0.001)
    assert decode.get_total_flops() == pytest.approx(work.VAE_DECODE, rel=0.001)
