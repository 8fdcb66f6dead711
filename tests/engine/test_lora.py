"""LoRA files: three key styles, nothing dropped, fp32 merge, the right expert."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from safetensors.torch import save_file

from engine.lora import check_covered, check_distinct, check_expert, identify_expert, load_lora, merge
from engine.lora_keys import target
from schemas.errors import WeightsCorrupt

WIDTH, FFN, BLOCKS, RANK = 32, 48, 2, 4
SHAPES = {  # original Wan names -> (out, in), the ten linear layers of a block
    **{f"{kind}.{letter}": (WIDTH, WIDTH) for kind in ("self_attn", "cross_attn") for letter in "qkvo"},
    "ffn.0": (FFN, WIDTH),
    "ffn.2": (WIDTH, FFN),
}
NAMES = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
STYLES = {  # key of the down matrix, of the up matrix, of alpha
    "official": ("{}.lora_A.default.weight", "{}.lora_B.default.weight", None),
    "comfy_ab": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", None),
    "comfy_updown": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight", None),
    "lightx2v": (
        "diffusion_model.{}.lora_down.weight",
        "diffusion_model.{}.lora_up.weight",
        "diffusion_model.{}.alpha",
    ),
}


def factors(seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"blocks.{block}.{module}": (
            torch.randn(RANK, shape[1], generator=generator) / 8,
            torch.randn(shape[0], RANK, generator=generator) / 8,
        )
        for block in range(BLOCKS)
        for module, shape in SHAPES.items()
    }


def written(path, style: str, pairs, alpha: float = RANK, metadata=None):
    down_key, up_key, alpha_key = STYLES[style]
    tensors = {}
    for module, (down, up) in pairs.items():
        tensors[down_key.format(module)] = down.clone()
        tensors[up_key.format(module)] = up.clone()
        if alpha_key:
            tensors[alpha_key.format(module)] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return path


def tiny_transformer(seed: int = 0) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_layers=BLOCKS,
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        ffn_dim=FFN,
        in_channels=36,
        out_channels=16,
        text_dim=8,
        freq_dim=8,
        cross_attn_norm=True,
        image_dim=WIDTH,
        added_kv_proj_dim=WIDTH,
    ).eval()


def test_target_reaches_every_parameter_of_the_model_from_the_original_names():
    linear = ["self_attn." + letter for letter in "qkvo"] + ["cross_attn." + letter for letter in "qkvo"]
    linear += ["cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2", "norm3"]
    scales = ["self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k"]
    scales += ["cross_attn.norm_k_img"]
    keys = []
    for block in range(BLOCKS):
        keys += [f"blocks.{block}.{module}.{part}" for module in linear for part in ("diff", "diff_b")]
        keys += [f"blocks.{block}.{module}.diff" for module in [*scales, "modulation"]]
    top = ["patch_embedding", "head.head", "time_projection.1", "time_embedding.0", "time_embedding.2"]
    top += ["text_embedding.0", "text_embedding.2"] + [f"img_emb.proj.{i}" for i in (0, 1, 3, 4)]
    keys += [f"{module}.{part}" for module in top for part in ("diff", "diff_b")] + ["head.modulation.diff"]

    reached = sorted(target(key).parameter for key in keys)

    assert reached == sorted(tiny_transformer().state_dict())


@pytest.mark.parametrize("style", STYLES)
def test_load_lora_finds_the_same_delta_in_every_key_style(tmp_path, style):
    pairs = factors(1)
    lora = load_lora(written(tmp_path / "high.safetensors", style, pairs))
    assert len(lora.deltas) == 20
    for module, (down, up) in pairs.items():
        head, _, inside = module.partition(".")[2].partition(".")
        assert torch.equal(lora.deltas[f"blocks.{head}.{NAMES[inside]}.weight"].dense(), up @ down)


@pytest.mark.parametrize("style", ["comfy_ab", "lightx2v"])
def test_load_lora_agrees_with_the_converter_of_diffusers_on_the_keys_it_knows(tmp_path, style):
    path = written(tmp_path / "high.safetensors", style, factors(2), alpha=3.0)
    ours = {name: delta.dense() for name, delta in load_lora(path).deltas.items()}

    from safetensors.torch import load_file

    theirs = _convert_non_diffusers_wan_lora_to_diffusers(load_file(path))
    modules = [key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in theirs if "lora_A" in key]
    assert sorted(f"{module}.weight" for module in modules) == sorted(ours)
    for module in modules:
        product = theirs[f"transformer.{module}.lora_B.weight"] @ theirs[f"transformer.{module}.lora_A.weight"]
        # fp32: the converter scales `down` before the product, we scale after it
        torch.testing.assert_close(ours[f"{module}.weight"], product, rtol=1e-5, atol=1e-6)


def test_load_lora_scales_by_alpha_over_rank(tmp_path):
    pairs = {"blocks.0.self_attn.q": (torch.ones(4, 2), torch.ones(3, 4))}
    lora = load_lora(written(tmp_path / "high.safetensors", "lightx2v", pairs, alpha=1.0))
    assert lora.deltas["blocks.0.attn1.to_q.weight"].dense().tolist() == [[1.0, 1.0]] * 3  # 4 ranks of 1, times 1/4


def test_load_lora_keeps_whole_deltas(tmp_path):
    tensors = {
        "diffusion_model.blocks.1.self_attn.q.diff_b": torch.full((WIDTH,), 2.0),
        "diffusion_model.blocks.0.norm3.diff": torch.full((WIDTH,), 3.0),
        "diffusion_model.head.head.diff": torch.full((64, WIDTH), 4.0),
        "diffusion_model.blocks.0.modulation.diff": torch.full((1, 6, WIDTH), 5.0),
    }
    save_file(tensors, tmp_path / "low.safetensors")
    lora = load_lora(tmp_path / "low.safetensors")
    check_covered([lora], set(tiny_transformer().state_dict()))
    assert {name: delta.dense().flatten()[0].item() for name, delta in lora.deltas.items()} == {
        "blocks.1.attn1.to_q.bias": 2.0,
        "blocks.0.norm2.weight": 3.0,
        "proj_out.weight": 4.0,
        "blocks.0.scale_shift_table": 5.0,
    }


@pytest.mark.parametrize(
    "key",
    [
        "blocks.0.diff_m",
        "blocks.0.self_attn.q.dora_scale",
        "blocks.0.self_attn.q.lora_mid.weight",
        "blocks.0.self_attn.q.lora_A.second.weight",
        "blocks.0.self_attn.q.lora_B.bias",
        "blocks.0.self_attn.qkv.lora_A.weight",
        "blocks.0.temporal_attn.q.lora_A.weight",
        "blocks.0.ffn.1.lora_A.weight",
        "blocks.x.ffn.0.lora_A.weight",
        "head.modulation.lora_A.weight",
        "blocks.0.modulation.diff_b",
        "lora_unet_blocks_0_self_attn_q.lora_down.weight",
        "text_encoder.layers.0.lora_A.weight",
        "model.blocks.0.self_attn.q.lora_A.weight",
        "diff",
        "",
    ],
)
def test_load_lora_refuses_a_key_that_it_cannot_place(tmp_path, key):
    path = tmp_path / "high.safetensors"
    down, up = torch.ones(2, 8), torch.ones(8, 2)
    good = {"blocks.0.self_attn.k.lora_A.weight": down, "blocks.0.self_attn.k.lora_B.weight": up}
    save_file({**good, key: torch.ones(2, 8)}, path)
    with pytest.raises(WeightsCorrupt) as caught:
        load_lora(path)
    assert caught.value.sentence == f"high.safetensors: 1 of 3 keys have no place in the model: {key}"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds no tensors"),
        ({"blocks.0.ffn.0.lora_A.weight": (2, 8)}, "is down; it needs down and up"),
        ({"blocks.0.ffn.0.lora_up.weight": (8, 2)}, "is up; it needs down and up"),
        ({"blocks.0.ffn.0.alpha": ()}, "is alpha; it needs down and up"),
        (
            {"blocks.0.ffn.0.lora_A.weight": (2, 8), "blocks.0.ffn.0.lora_B.weight": (8, 3)},
            "not two thin matrices",
        ),
        (
            {"blocks.0.ffn.0.lora_A.weight": (2, 8, 1), "blocks.0.ffn.0.lora_B.weight": (8, 2)},
            "not two thin matrices",
        ),
        (
            {
                "blocks.0.ffn.0.lora_A.weight": (0, 8),
                "blocks.0.ffn.0.lora_B.weight": (8, 0),
                "blocks.0.ffn.0.alpha": (),
            },
            "not two thin matrices",
        ),
        (
            {
                "blocks.0.ffn.0.lora_A.weight": (2, 8),
                "diffusion_model.blocks.0.ffn.0.lora_down.weight": (2, 8),
            },
            "are both down of blocks.0.ffn.net.0.proj.weight",
        ),
        (
            {
                "blocks.0.ffn.0.lora_A.weight": (2, 8),
                "blocks.0.ffn.0.lora_B.weight": (8, 2),
                "blocks.0.ffn.0.diff": (8, 8),
            },
            "is diff, down, up; it needs down and up",
        ),
        (
            {
                "blocks.0.ffn.0.lora_A.weight": (2, 8),
                "blocks.0.ffn.0.lora_B.weight": (8, 2),
                "blocks.0.ffn.0.alpha": (2,),
            },
            "is not one number",
        ),
    ],
)
def test_load_lora_refuses_half_a_delta(tmp_path, tensors, words):
    path = tmp_path / "high.safetensors"
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, path)
    with pytest.raises(WeightsCorrupt, match=words):
        load_lora(path)


def test_load_lora_refuses_a_file_that_is_cut_or_absent(tmp_path):
    whole = written(tmp_path / "high.safetensors", "official", factors(1)).read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(WeightsCorrupt, match=r"cut\.safetensors is not a readable"):
            load_lora(tmp_path / "cut.safetensors")
    with pytest.raises(WeightsCorrupt):
        load_lora(tmp_path / "absent.safetensors")


def test_merge_gives_each_expert_its_own_sum(tmp_path):
    """high = W + 1.0 SVI high + 1.2 LightX2V high, low = W + 1.0 SVI low + 1.0 LightX2V low, in fp32."""
    for expert, strength, seed in (("high", 1.2, 10), ("low", 1.0, 20)):
        svi_pairs, light_pairs = factors(seed), factors(seed + 1)
        svi = load_lora(written(tmp_path / f"svi_{expert}.safetensors", "official", svi_pairs))
        light = load_lora(written(tmp_path / f"light_{expert}.safetensors", "lightx2v", light_pairs, alpha=8.0))
        for name, weight in tiny_transformer().state_dict().items():
            merged = merge(weight, name, [(svi, 1.0), (light, strength)])
            source = next((m for m in svi_pairs if name == _diffusers_name(m)), None)
            if source is None:
                assert merged is weight
            else:
                (svi_down, svi_up), (light_down, light_up) = svi_pairs[source], light_pairs[source]
                expected = weight.double() + svi_up.double() @ svi_down.double()
                expected += strength * 2.0 * light_up.double() @ light_down.double()  # alpha 8 / rank 4
                torch.testing.assert_close(merged.double(), expected, rtol=0, atol=1e-6)  # fp32 against fp64


def _diffusers_name(module: str) -> str:
    _, block, inside = module.split(".", 2)
    return f"blocks.{block}.{NAMES[inside]}.weight"


def test_merge_sums_in_fp32_and_casts_once(tmp_path):
    """Two deltas of 3/1024 on a bf16 1.0 (steps of 1/128): each alone is rounded away, the sum is not."""
    pair = {"blocks.0.self_attn.q": (torch.full((1, 2), 3 / 1024), torch.ones(2, 1))}
    lora = load_lora(written(tmp_path / "high.safetensors", "official", pair))
    weight = torch.ones(2, 2, dtype=torch.bfloat16)
    merged = merge(weight, "blocks.0.attn1.to_q.weight", [(lora, 1.0), (lora, 1.0)])
    one_by_one = weight + torch.tensor(3 / 1024, dtype=torch.bfloat16) + torch.tensor(3 / 1024, dtype=torch.bfloat16)
    assert merged.dtype == torch.bfloat16
    assert merged.tolist() == [[1.0078125, 1.0078125]] * 2
    assert one_by_one.tolist() == [[1.0, 1.0]] * 2


def test_merge_leaves_the_given_weight_alone(tmp_path):
    lora = load_lora(written(tmp_path / "high.safetensors", "official", factors(1)))
    weight = torch.ones(WIDTH, WIDTH)
    merge(weight, "blocks.0.attn1.to_q.weight", [(lora, 1.0)])
    assert torch.equal(weight, torch.ones(WIDTH, WIDTH))


def test_merge_refuses_another_shape(tmp_path):
    lora = load_lora(written(tmp_path / "high.safetensors", "official", factors(1)))
    with pytest.raises(WeightsCorrupt) as caught:
        merge(torch.zeros(WIDTH, 1), "blocks.0.attn1.to_q.weight", [(lora, 1.0)])
    assert caught.value.sentence == (
        "high.safetensors: blocks.0.self_attn.q.lora_A.default.weight changes blocks.0.attn1.to_q.weight "
        "by (32, 32), but the weight is (32, 1)"
    )


def test_merge_refuses_a_sum_that_is_not_finite(tmp_path):
    pairs = factors(1)
    pairs["blocks.0.self_attn.q"][0][0, 0] = torch.nan
    lora = load_lora(written(tmp_path / "high.safetensors", "official", pairs))
    with pytest.raises(WeightsCorrupt, match="not finite"):
        merge(torch.zeros(WIDTH, WIDTH), "blocks.0.attn1.to_q.weight", [(lora, 1.0)])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_merge_refuses_a_quantised_weight(tmp_path, dtype):
    lora = load_lora(written(tmp_path / "high.safetensors", "official", factors(1)))
    with pytest.raises(ValueError, match="merge before quantising"):
        merge(torch.zeros(WIDTH, WIDTH).to(dtype), "blocks.0.attn1.to_q.weight", [(lora, 1.0)])


def test_check_covered_names_both_names_of_what_has_no_parameter(tmp_path):
    pairs = factors(1) | {"blocks.7.ffn.0": (torch.ones(RANK, WIDTH), torch.ones(FFN, RANK))}
    lora = load_lora(written(tmp_path / "high.safetensors", "comfy_ab", pairs))
    with pytest.raises(WeightsCorrupt) as caught:
        check_covered([lora], set(tiny_transformer().state_dict()))
    assert caught.value.sentence == (
        "high.safetensors: 1 of 21 deltas have no parameter: "
        "diffusion_model.blocks.7.ffn.0.lora_A.weight -> blocks.7.ffn.net.0.proj.weight"
    )


def test_check_covered_accepts_a_file_that_fits(tmp_path):
    lora = load_lora(written(tmp_path / "high.safetensors", "comfy_ab", factors(1)))
    check_covered([lora], set(tiny_transformer().state_dict()))


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("SVI_Wan2.2-I2V-A14B_high_noise_lora_v2.0_pro.safetensors", "high"),
        ("SVI_Wan2.2-I2V-A14B_low_noise_lora_v2.0_pro.safetensors", "low"),
        ("SVI_v2_PRO_Wan2.2-I2V-A14B_HIGH_lora_rank_128_fp16.safetensors", "high"),
        ("SVI_v2_PRO_Wan2.2-I2V-A14B_LOW_lora_rank_128_fp16.safetensors", "low"),
        ("wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors", "high"),
        ("wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors", "low"),
        ("flow_high.safetensors", "high"),
    ],
)
def test_identify_expert_reads_the_published_names(tmp_path, name, expert):
    lora = load_lora(written(tmp_path / name, "official", factors(1)))
    assert identify_expert(lora, {}) == expert


def test_check_expert_detects_swapped_names_by_sha256(tmp_path):
    """The two files changed names: every size and key is right, only the content tells."""
    high = load_lora(written(tmp_path / "a_high.safetensors", "official", factors(1)))
    low = load_lora(written(tmp_path / "a_low.safetensors", "official", factors(2)))
    known = {high.sha256: "high", low.sha256: "low"}
    check_expert(high, "high", known)
    (tmp_path / "a_high.safetensors").rename(tmp_path / "aside")
    (tmp_path / "a_low.safetensors").rename(tmp_path / "a_high.safetensors")
    swapped = load_lora(tmp_path / "a_high.safetensors")
    with pytest.raises(WeightsCorrupt, match="its sha256 says low, its name says high"):
        check_expert(swapped, "high", known)
    check_expert(swapped, "high", {})  # without the table the name alone is believed


def test_check_expert_detects_swapped_rows_by_name(tmp_path):
    low = load_lora(written(tmp_path / "a_low_noise.safetensors", "official", factors(1)))
    with pytest.raises(WeightsCorrupt) as caught:
        check_expert(low, "high", {})
    assert caught.value.sentence == "a_low_noise.safetensors is for the low-noise expert, not the high-noise one"


def test_check_expert_hears_the_metadata(tmp_path):
    path = written(tmp_path / "lora.safetensors", "official", factors(1), metadata={"expert": "low"})
    check_expert(load_lora(path), "low", {})
    with pytest.raises(WeightsCorrupt):
        check_expert(load_lora(path), "high", {})


@pytest.mark.parametrize("name", ["lora.safetensors", "high_and_low.safetensors", "flow.safetensors"])
def test_identify_expert_refuses_to_guess(tmp_path, name):
    lora = load_lora(written(tmp_path / name, "official", factors(1)))
    with pytest.raises(WeightsCorrupt, match="nothing says for which expert"):
        identify_expert(lora, {})


def test_check_distinct_detects_one_file_under_two_names(tmp_path):
    high = load_lora(written(tmp_path / "a_high.safetensors", "official", factors(1)))
    copy = load_lora(written(tmp_path / "a_low.safetensors", "official", factors(1)))
    other = load_lora(written(tmp_path / "b_low.safetensors", "official", factors(2)))
    check_distinct([high, other])
    with pytest.raises(WeightsCorrupt, match=r"a_high\.safetensors and a_low\.safetensors are the same file"):
        check_distinct([high, copy])
