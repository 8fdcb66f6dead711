"""The planner: which placement fits how many bytes, and that the bytes it counts with are the real ones."""

from dataclasses import replace

import pytest
import torch

from engine import residency
from engine.geometry import VideoShape
from engine.linear8 import replace_linears
from engine.packing import layout
from engine.parts import empty_model, stored_dtype
from engine.profiles import PROFILES
from engine.published import published_values
from engine.residency import GIB, plan, room_bytes
from schemas.errors import RequestTooLarge, SettingsError

# Working memory is a measurement and moves with the code; the planner's arithmetic is tested on fixed figures.
ROWS = {
    name: replace(row, work_bytes=10_500_000_000, narrow_work_bytes=6_000_000_000) for name, row in PROFILES.items()
}
SVI = ROWS["wan22_i2v_svi"]
VIDEO = ROWS["wan21_i2v_480p"]
ADA = (8, 9)


@pytest.mark.parametrize(
    ("profile", "precision", "card_gib", "kind", "encoder"),
    [
        ("wan22_i2v_svi", "fp8", 44.5, "resident", "card"),
        ("wan22_i2v_svi", "fp8", 40, "resident", "card"),
        ("wan22_i2v_svi", "fp8", 36, "resident", "visits"),
        ("wan22_i2v_svi", "int8", 44.5, "resident", "card"),
        ("wan22_i2v_svi", None, 140, "resident", "card"),
        ("wan22_i2v_svi", None, 48, "swap", "card"),
        ("wan22_i2v_svi", None, 44.5, "swap", "visits"),
        ("wan22_i2v_svi", None, 40, "swap", "visits"),
        ("wan22_i2v_svi", None, 24, "stream", "visits"),
        ("wan22_i2v_svi", "fp8", 24, "swap", "visits"),
        ("wan22_i2v_svi", "fp8", 16, "stream", "visits"),
        ("wan21_i2v_480p", None, 44.5, "resident", "visits"),
        ("wan21_i2v_480p", None, 24, "stream", "visits"),
        ("sdxl", None, 44.5, "resident", "card"),
    ],
)
def test_plan_picks_what_moves_least_and_fits(profile, precision, card_gib, kind, encoder):
    made = plan(ROWS[profile], int(card_gib * GIB), precision=precision, capability=ADA)
    assert (made.kind, made.where("text_encoder")) == (kind, encoder)
    assert made.card_bytes <= card_gib * GIB


def test_resident_plan_locks_no_host_memory_and_swap_locks_both_experts():
    assert plan(SVI, 45 * GIB, precision="fp8", capability=ADA).host_bytes == 0
    assert plan(SVI, 48 * GIB).host_bytes == 2 * 28_636_170_368


def test_experts_that_take_turns_are_counted_once_on_the_card():
    made = plan(SVI, 48 * GIB)
    assert made.card_bytes == 28_636_170_368 + 11_361_820_672 + 507_570_124 + 10_500_000_000


def test_visitor_larger_than_the_activations_sets_the_peak():
    made = plan(SVI, 40 * GIB)
    assert made.card_bytes == 28_636_170_368 + 507_570_124 + 11_361_820_672


def test_too_little_card_is_refused_with_both_numbers():
    with pytest.raises(RequestTooLarge, match=r"at least 7\.9 GiB of card.*the card has 7\.0 GiB"):
        plan(SVI, 7 * GIB, precision="fp8", capability=ADA)


def test_larger_video_needs_more_and_is_refused_where_the_usual_one_fits():
    assert plan(SVI, 13 * GIB, precision="fp8").kind == "stream"
    with pytest.raises(RequestTooLarge):
        plan(SVI, 13 * GIB, precision="fp8", shape=VideoShape(81, 720, 1280))


def test_activations_follow_the_tokens():
    made = plan(SVI, 140 * GIB, shape=VideoShape(81, 720, 1280))
    assert made.work_bytes == round(10_500_000_000 * 75_600 / 32_760)


def test_too_little_host_memory_leaves_the_next_placement():
    made = plan(SVI, 45 * GIB, precision="fp8", host_bytes=0)
    assert made.kind == "resident"
    with pytest.raises(
        RequestTooLarge, match=r"63\.9 GiB of host memory; the card has 45\.0 GiB and the host 50\.0 GiB"
    ):
        plan(SVI, 45 * GIB, host_bytes=50 * GIB)


@pytest.mark.parametrize(("host_gib", "is_room"), [(53.3, False), (53.4, True)])
def test_host_without_room_for_both_experts_leaves_none_on_the_card(host_gib, is_room):
    """The smallest claim is 53.34 GiB, with the encoder on the card; what stays there leaves room for a small size."""
    left_bytes = room_bytes(SVI, 45 * GIB, None, int(host_gib * GIB))
    assert left_bytes == (is_room and 45 * GIB - 28_636_170_368 - 11_361_820_672 - 507_570_124)


def test_reasons_say_what_did_not_fit():
    made = plan(SVI, 48 * GIB)
    assert made.reasons == (
        "resident, encoders on the card needs 74.17 GiB of the card",
        "resident, encoders visiting needs 64.39 GiB of the card",
    )


def test_reasons_say_that_the_card_has_no_fast_8_bit_product():
    made = plan(SVI, 45 * GIB, precision="fp8", capability=(8, 6))
    assert made.reasons == ("fp8 products need compute capability 8.9: weights are widened",)
    assert plan(SVI, 45 * GIB, precision="int8", capability=(8, 6)).reasons == ()


def test_weights_baked_in_8_bits_are_not_made_wider():
    baked = SVI.baked_in("fp8")
    assert plan(baked, 140 * GIB).precision == "fp8"
    with pytest.raises(SettingsError, match="baked in fp8"):
        plan(baked, 140 * GIB, precision="bf16")


def test_resident_8_bit_plan_with_the_encoder_leaves_ten_gigabytes_of_work_on_a_48_gb_card():
    work = replace(SVI, narrow_work_bytes=10_000_000_000)
    made = plan(work, int(44.5 * GIB), precision="fp8", capability=ADA)
    assert {row.component: row.where for row in made.rows} == dict.fromkeys(
        ("text_encoder", "vae", "transformer", "transformer_2"), "card"
    )


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_plan_of_an_8_bit_bake_is_that_of_a_bf16_bake_rounded_at_load(precision):
    at_load = plan(SVI, 40 * GIB, precision=precision)
    as_baked = plan(SVI.baked_in(precision), 40 * GIB)
    assert (as_baked.precision, as_baked.kind, as_baked.rows) == (at_load.precision, at_load.kind, at_load.rows)


def test_table_shows_every_component_and_the_peak():
    table = plan(SVI, int(44.5 * GIB), precision="fp8", capability=ADA).table()
    assert table.splitlines() == [
        "wan22_i2v_svi: resident, fp8",
        "  text_encoder        6.27 GiB  card",
        "  vae                 0.47 GiB  card",
        "  transformer        13.59 GiB  card",
        "  transformer_2      13.59 GiB  card",
        "  activations         5.59 GiB  at the largest size",
        "  card, peak         39.52 GiB  of 44.50 GiB",
        "  host, locked        0.00 GiB",
    ]


@pytest.mark.parametrize("profile", [SVI, VIDEO])
def test_shares_are_those_of_the_real_architecture(profile):
    component = profile.component("transformer")
    model = empty_model(component, published_values(component))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(stored_dtype(component, name))
    wide = layout(model)
    outside = sum(piece.size_bytes for piece in wide[:2]) / component.size_bytes
    assert outside == pytest.approx(residency.OUTSIDE_BLOCKS_SHARE, abs=0.003)
    assert len(wide) - 2 == residency.BLOCKS
    replace_linears(model, "fp8")
    narrow = sum(piece.size_bytes for piece in layout(model))
    outside = sum(piece.size_bytes for piece in layout(model)[:2]) / narrow
    assert outside == pytest.approx(residency.OUTSIDE_BLOCKS_SHARE_NARROW, abs=0.004)
    assert narrow == pytest.approx(component.narrow_size_bytes, rel=0.001)  # pieces begin at multiples of 256 bytes
    assert torch.float8_e4m3fn in {field.dtype for field in layout(model)[2].fields}
