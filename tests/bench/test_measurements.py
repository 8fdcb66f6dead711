"""Ladder, swap and VAE measurements run through on a CPU with tiny models: the card's time is too dear for typos."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from bench import kernels, swap, vae
from bench.ceilings import Ceilings
from bench.ladder import Ladder
from bench.work import Forward
from engine.geometry import VideoShape
from tests.engine.tiny_wan import make_wan, wan_inputs


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def test_ladder_tells_each_rung_against_the_first():
    ceilings = Ceilings({"bf16": 1.0}, {"native": 1.0, "sage": 9.0}, 1.0)
    given = {**wan_inputs(), "return_dict": False}
    rungs = Ladder(make_wan(0), ceilings, given, Forward(1e9, 1e9, 0.0), device="cpu", backend="eager").climb()
    assert [rung.name for rung in rungs] == ["diffusers, eager", "+ native", "+ compile"]
    assert [rung.snr_db for rung in rungs] == [float("inf")] * 3  # the same arithmetic, in the same order
    assert all(rung.floor_share == pytest.approx(0.002 / rung.seconds) for rung in rungs)
    assert rungs[0].kernels == {"_scaled_mm": 0, "_int_mm": 0}


def test_swap_tells_bytes_and_equality_of_each_way():
    experts = {"high": make_wan(0), "low": make_wan(1)}
    size_gb = sum(t.numel() * t.element_size() for t in experts["high"].state_dict().values()) / 1e9
    given = {**wan_inputs(), "return_dict": False}
    results = swap.compare(lambda name: {"high": make_wan(0), "low": make_wan(1)}[name], given, "cpu", "eager", 1)
    assert [(result.name, result.equal) for result in results] == [
        ("both on the card", True), ("rolling swap", True), ("blocking swap", True),
    ]  # fmt: skip
    assert results[0].moved_gb == 0
    assert results[1].moved_gb == pytest.approx(2 * size_gb, rel=0.1)  # the pieces' alignment, large against tiny ones


def test_vae_tells_that_the_memoised_encode_is_equal():
    torch.manual_seed(0)
    model = AutoencoderKLWan(base_dim=8).eval().requires_grad_(False)
    rows = vae.compare(model, "cpu", VideoShape(13, 32, 32))
    assert [row.name for row in rows] == [
        "encode, stock fp32", "encode, memoised fp32", "decode, stock fp32", "decode, stock bf16",
        "decode, ours bf16, in chunks",
    ]  # fmt: skip
    assert rows[1].says.startswith("equal: True; stage runs ")


def test_kernel_table_keeps_the_dearest_and_sums_the_rest():
    times = [(f"k{i}", 2, float(i)) for i in range(kernels.SHOWN + 3)]
    lines = kernels.table(times)
    assert (lines[0].kernel, lines[0].milliseconds) == ("k18", 18.0)
    assert (lines[-2].kernel, lines[-2].milliseconds) == ("2 others", 3.0)  # k1 and k2; k0 took no time
    assert (lines[-1].kernel, lines[-1].milliseconds, lines[-1].calls) == ("all", 171.0, 36)
    assert sum(line.share for line in lines[:-1]) == pytest.approx(1.0)
