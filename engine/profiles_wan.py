"""The rows for Wan2.1 and Wan2.2 image-to-video.

Source of the numbers: the Wan-AI repositories in diffusers form; wan/configs of Wan-Video/Wan2.1 and Wan2.2;
for the SVI rows, wan_2_2_i2v_lightning_svi_3_3.json and wan_2_2_i2v_lightning_svi_endframe.json as published.
"""

from dataclasses import replace
from types import MappingProxyType

from engine.profile import Component, Lora, Phase, Placement, Profile, Schedule, Source

WAN21 = Source("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers")
WAN22 = Source("Wan-AI/Wan2.2-I2V-A14B-Diffusers")
SVI = Source("vita-video-gen/svi-model")
LIGHTX2V = Source("Comfy-Org/Wan_2.2_ComfyUI_Repackaged")

# Source: WanTransformer3DModel._keep_in_fp32_modules (diffusers 0.42.1); a test compares the two.
TRANSFORMER_FP32 = ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")

# fmt: off
SHARED = (
    Component("tokenizer", "transformers", "AutoTokenizer", WAN21, "tokenizer", "shared/umt5_tokenizer"),
    Component(
        "text_encoder", "transformers", "UMT5EncoderModel", WAN21, "text_encoder", "shared/umt5_xxl",
        published="umt5_xxl", dtype="bf16", tied=(("encoder.embed_tokens.weight", "shared.weight"),),
        size_bytes=11_361_820_672, narrow_size_bytes=6_735_241_216,
    ),
    # fp32: a bf16 encode shifts the picture that every later frame is held against
    Component(
        "vae", "diffusers", "AutoencoderKLWan", WAN21, "vae", "shared/wan_vae",
        published="wan_vae", dtype="fp32", size_bytes=507_570_124,
    ),
)
"""The same files in both Wan repositories: fetched from the first, stored once."""

WAN21_COMPONENTS = (
    *SHARED,
    Component(
        "image_processor", "transformers", "CLIPImageProcessor", WAN21, "image_processor",
        "wan21_i2v_480p/image_processor", published="wan21_image_processor",
    ),
    # fp32 as in diffusers' documented use of this model; it sees one picture a job
    Component(
        "image_encoder", "transformers", "CLIPVisionModel", WAN21, "image_encoder",
        "wan21_i2v_480p/image_encoder",
        published="wan21_image_encoder", dtype="fp32", prefix="vision_model.", size_bytes=2_523_064_320,
    ),
    Component(
        "transformer", "diffusers", "WanTransformer3DModel", WAN21, "transformer",
        "wan21_i2v_480p/transformer", published="wan21_i2v_transformer", dtype="bf16",
        keep_fp32=TRANSFORMER_FP32, size_bytes=32_848_151_168, narrow_size_bytes=16_711_303_808,
    ),
    Component(
        "scheduler", "diffusers", "UniPCMultistepScheduler", WAN21, "scheduler", "wan21_i2v_480p/scheduler",
        published="wan_scheduler",
    ),
)


def _wan22_components(folder: str) -> tuple[Component, ...]:
    """The parts of a bake into `folder`; each bake has experts of its own, with its LoRAs merged in."""
    return (
        *SHARED,
        Component(
            "transformer", "diffusers", "WanTransformer3DModel", WAN22, "transformer",
            f"{folder}/transformer", published="wan22_i2v_transformer", dtype="bf16",
            keep_fp32=TRANSFORMER_FP32, size_bytes=28_636_170_368, narrow_size_bytes=14_594_836_608,
        ),
        Component(
            "transformer_2", "diffusers", "WanTransformer3DModel", WAN22, "transformer_2",
            f"{folder}/transformer_2", published="wan22_i2v_transformer", dtype="bf16",
            keep_fp32=TRANSFORMER_FP32, size_bytes=28_636_170_368, narrow_size_bytes=14_594_836_608,
        ),
        Component(
            "scheduler", "diffusers", "UniPCMultistepScheduler", WAN22, "scheduler", f"{folder}/scheduler",
            published="wan_scheduler",
        ),
    )
# fmt: on

WORK_480P_BYTES = 10_500_000_000  # of the fp32 VAE, measured at 832x480x81
# The memoised encode, measured: 8.9 GB. An 8-bit forward takes 4.8 eager, 2.5 compiled; the bf16 decode less than 5.5.
NARROW_WORK_480P_BYTES = 9_000_000_000

WAN21_I2V_480P = Profile(
    name="wan21_i2v_480p",
    backend="wan",
    modes=("video",),
    folder="wan21_i2v_480p",
    components=WAN21_COMPONENTS,
    schedule=Schedule("unipc", steps=40, flow_shift=3.0),
    phases=(Phase("single", 5.0),),
    placement=(
        Placement("transformer", "card"),
        Placement("vae", "card"),
        Placement("text_encoder", "visits"),
        Placement("image_encoder", "visits"),
    ),
    work_bytes=WORK_480P_BYTES,
    narrow_work_bytes=NARROW_WORK_480P_BYTES,
    size_multiple=16,
    min_side=256,
    max_area=480 * 832,
    height=480,
    width=832,
    frames=81,
    max_frames=81,
    fps=16,
)

LIGHTNING_HIGH = Lora(
    LIGHTX2V, "split_files/loras/wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors", "high", 1.0
)
LIGHTNING_LOW = Lora(LIGHTX2V, "split_files/loras/wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors", "low", 1.0)
SVI_LORAS = (
    Lora(SVI, "version-2.0/SVI_Wan2.2-I2V-A14B_high_noise_lora_v2.0_pro.safetensors", "high", 1.0),
    Lora(SVI, "version-2.0/SVI_Wan2.2-I2V-A14B_low_noise_lora_v2.0_pro.safetensors", "low", 1.0),
    replace(LIGHTNING_HIGH, strength=1.2),
    LIGHTNING_LOW,
)

WAN22_I2V_SVI = Profile(
    name="wan22_i2v_svi",
    backend="wan_svi",
    modes=("svi_endframe",),
    folder="wan22_i2v_svi",
    components=_wan22_components("wan22_i2v_svi"),
    loras=SVI_LORAS,
    layout="svi_latent",
    # 883: a hair above the third point of the 6-step grid (882.53), so 2 steps run high and 4 run low
    schedule=Schedule("euler", steps=6, flow_shift=5.0, switch_threshold=883.0),
    phases=(Phase("high", 1.0), Phase("low", 1.0)),
    placement=(
        Placement("transformer", "card"),
        Placement("transformer_2", "swaps"),
        Placement("vae", "card"),
        Placement("text_encoder", "visits"),
    ),
    work_bytes=WORK_480P_BYTES,
    narrow_work_bytes=NARROW_WORK_480P_BYTES,
    size_multiple=16,
    min_side=256,
    max_area=480 * 832,
    height=480,
    width=832,
    frames=81,
    max_frames=81,
    fps=16,
    negative_prompt="fading, breaking, shot cuts, jumpcuts, blurry, noise, distorted",
)
"""The bake, and what it runs as when no profile is named."""

SVI_3_3 = replace(
    WAN22_I2V_SVI,
    name="wan_2_2_i2v_lightning_svi_3_3",
    settings=MappingProxyType(
        {
            "architecture": "i2v_2_2",
            "svi2pro": True,
            "loras_multipliers": ("1;0", "0;1", "1.2;0", "0;1"),
            "lock_guidance_phases": True,
            "group": "wan2_2",
            "guidance_phases": 2,
            "model_switch_phase": 1,
            "seed": 12345,
        }
    ),
)

ENDFRAME = replace(
    WAN22_I2V_SVI,
    name="wan_2_2_i2v_lightning_svi_endframe",
    layout="flf",
    phases=(Phase("high", 3.0), Phase("low", 1.0)),
    settings=MappingProxyType(
        {
            **SVI_3_3.settings,
            "svi2pro": False,
            "model_switch_phase": 1,
            "corrections": ("model_switch_phase runs as 1: as published, 2, the low-noise expert would never run",),
        }
    ),
)

WAN22_I2V_LIGHTNING = replace(
    WAN22_I2V_SVI,
    name="wan22_i2v_lightning",
    backend="wan_lightning",
    modes=("video",),
    folder="wan22_i2v_lightning",
    components=_wan22_components("wan22_i2v_lightning"),
    loras=(LIGHTNING_HIGH, LIGHTNING_LOW),
    layout=None,
    # 900: Wan2.2's own boundary of 0.9. High, low: 2 + 2 of four steps, 2 + 3 of five, 3 + 3 of six, 3 + 4, 3 + 5.
    # Four steps are t = 1000, 937.5, 833.3, 625, for which the LoRAs were distilled.
    schedule=Schedule("euler_distilled", steps=4, flow_shift=5.0, switch_threshold=900.0),
    negative_prompt="",
)
"""`video` in 4 forwards in place of 80. Lossy: distilled, so another model, and one with less motion."""
