"""Ladder, swap and VAE measurements run through on a CPU with tiny models: the card's time is too dear for typos."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from bench import kernels, swap, vae
from bench.ceilings import Ceilings
from bench.ladder import Ladder
from bench.work import Forward
from engine.experts import RollingExperts
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


SEEDS = {"high": 0, "low": 1}


def expert_gb() -> float:
    return sum(t.numel() * t.element_size() for t in make_wan(0).state_dict().values()) / 1e9


def test_swap_tells_bytes_and_equality_of_each_way(capsys):
    drawn = []

    def load(name):
        drawn.append(name)
        return make_wan(SEEDS[name])

    given = {**wan_inputs(), "return_dict": False}
    results = swap.compare(load, given, "cpu", "eager")
    assert [(result.name, result.equal) for result in results] == [
        ("both on the card", True), ("rolling swap", True), ("blocking swap", True),
    ]  # fmt: skip
    assert [result.moved_gb for result in results] == pytest.approx([0, 2 * expert_gb(), 2 * expert_gb()], rel=0.1)
    assert all(len(result.forwards_s) == 6 for result in results)
    assert all(result.visible_s == result.seconds - results[0].seconds for result in results)
    assert drawn == ["high", "low"]  # once each: the swap moves the very weights that the reference ran with
    said = capsys.readouterr().err
    assert "drew the low expert" in said
    assert "blocking swap: " in said


def test_swap_notices_an_expert_that_is_not_the_one_it_should_be(monkeypatch):
    place = RollingExperts.place

    def always_high(self, expert, i):
        place(self, "high", i)

    monkeypatch.setattr(RollingExperts, "place", always_high)
    given = {**wan_inputs(), "return_dict": False}
    results = swap.compare(lambda name: make_wan(SEEDS[name]), given, "cpu", "eager")
    assert [result.equal for result in results] == [True, False, False]


def test_slow_bus_copies_as_much_more_as_it_is_slower():
    experts = swap.SlowBus({"high": make_wan(0), "low": make_wan(1)}, "cpu", slower=2.2)
    moved = experts.repair("high")
    assert experts.bytes_again == pytest.approx(1.2 * moved, rel=0.001)
    given = wan_inputs()
    with torch.inference_mode(), experts.use("low") as model:
        assert torch.equal(model(**given)[0], make_wan(1)(**given)[0])


@pytest.mark.filterwarnings("ignore:.*kept in float32")
def test_vae_tells_that_the_memoised_encode_is_equal():
    torch.manual_seed(0)
    model = AutoencoderKLWan(base_dim=8).eval().requires_grad_(False)
    rows = {row.name: row for row in vae.compare(model, "cpu", VideoShape(13, 16, 16))}
    assert {"encode, stock fp32", "encode, memoised fp32", "decode, stock fp32", "decode, stock bf16"} < set(rows)
    assert rows["encode, memoised fp32"].says.startswith("equal: True; stage runs ")


def test_kernel_table_keeps_the_dearest_and_sums_the_rest():
    times = [(f"k{i}", 2, float(i)) for i in range(kernels.SHOWN + 3)]
    lines = kernels.table(times)
    assert (lines[0].kernel, lines[0].milliseconds) == ("k17", 17.0)
    assert (lines[-2].kernel, lines[-2].milliseconds) == ("2 others", 3.0)  # k1 and k2; k0 took no time
    assert (lines[-1].kernel, lines[-1].milliseconds, lines[-1].calls) == ("all", 153.0, 34)
    assert sum(line.share for line in lines[:-1]) == pytest.approx(1.0)


def launch(kernel: str, dur_us: float, launcher: int, name: str, shapes: list, types: list) -> list[dict]:
    args = {"External id": launcher, "Input Dims": shapes, "Input type": types}
    return [
        {"cat": "cpu_op", "name": name, "args": args},
        {"cat": "kernel", "name": kernel, "ts": 0, "dur": dur_us, "args": {"External id": launcher}},
    ]


BF16, FP8 = "c10::BFloat16", "c10::Float8_e4m3fn"


@pytest.mark.parametrize(
    ("kernel", "name", "shapes", "types", "sort", "rate"),
    [
        # 2 * 1000 * 500 * 200 operations in 1 ms
        ("nvjet_sm90_gemm", "aten::_scaled_mm", [[1000, 500], [500, 200], [1000, 1]], [FP8, FP8, "float"],
         "product", "0 TFLOP/s"),
        ("sm90_xmma_gemm", "aten::addmm", [[8192], [8192, 8192], [8192, 8192]], [BF16] * 3, "product",
         "1100 TFLOP/s"),
        # 4 * 1 * 32760 * 40 * 128 * 512
        ("kernel_cutlass_flash_attn", "svi_worker::attend",
         [[], [1, 32760, 40, 128], [1, 512, 40, 128], [1, 512, 40, 128]], ["", BF16, BF16, BF16], "attention",
         "344 TFLOP/s"),
        # 2 * 1000 * 1000 bytes and 4 * 1000
        ("triton_red_fused_flash_3", "triton_red_fused_flash_3", [[1000, 1000], [1000], []], [BF16, "float", "Scalar"],
         "fused", "2 GB/s"),
        ("vectorized_elementwise_kernel", "aten::add", [[1000, 1000]], [BF16], "elementwise", ""),
    ],
)  # fmt: skip
def test_kernel_is_told_with_the_rate_that_its_operators_shapes_give(kernel, name, shapes, types, sort, rate):
    (line, _) = kernels.by_kernel(kernels.launches(launch(kernel, 1000.0, 1, name, shapes, types)))
    assert (line.sort, line.rate) == (sort, rate)


def test_operator_with_two_kernels_tells_nothing_about_either():
    events = launch("gemm_splitk", 1000.0, 1, "aten::mm", [[64, 64], [64, 64]], [BF16, BF16])
    events.append({"cat": "kernel", "name": "splitk_reduce", "ts": 0, "dur": 10.0, "args": {"External id": 1}})
    assert [line.rate for line in kernels.by_kernel(kernels.launches(events))] == ["", "", ""]


def test_sorts_hold_the_work_of_a_forward():
    seen = kernels.launches(launch("gemm", 1000.0, 1, "aten::mm", [[2, 2], [2, 2]], [BF16, BF16]))
    (line,) = kernels.by_sort(seen, "fp8")
    assert (line.sort, line.calls, round(line.tflop, 1), line.precision) == ("product", 1, 785.5, "fp8")
