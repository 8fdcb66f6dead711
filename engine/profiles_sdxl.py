"""The row for SDXL: base and refiner, as worker-sdxl runs them.

Source of the numbers: stabilityai's repositories (model_index.json, configs) and worker-sdxl.
"""

from engine.profile import Component, Phase, Placement, Profile, Schedule, Source

BASE = Source("stabilityai/stable-diffusion-xl-base-1.0")
REFINER = Source("stabilityai/stable-diffusion-xl-refiner-1.0")
VAE = Source("madebyollin/sdxl-vae-fp16-fix")  # the published VAE overflows in fp16 and makes black pictures

# fmt: off
SDXL_COMPONENTS = (
    Component("tokenizer", "transformers", "CLIPTokenizer", BASE, "tokenizer", "sdxl/tokenizer"),
    Component("tokenizer_2", "transformers", "CLIPTokenizer", BASE, "tokenizer_2", "sdxl/tokenizer_2"),
    Component(
        "text_encoder", "transformers", "CLIPTextModel", BASE, "text_encoder", "sdxl/text_encoder",
        published="sdxl_text_encoder", dtype="fp16", variant="fp16", prefix="text_model.",
        size_bytes=246_120_960,
    ),
    Component(
        "text_encoder_2", "transformers", "CLIPTextModelWithProjection", BASE, "text_encoder_2",
        "sdxl/text_encoder_2", published="sdxl_text_encoder_2", dtype="fp16", variant="fp16",
        size_bytes=1_389_319_680,
    ),
    Component(
        "vae", "diffusers", "AutoencoderKL", VAE, "", "sdxl/vae",
        published="sdxl_vae", dtype="fp16", size_bytes=167_307_726,
    ),
    Component(
        "unet", "diffusers", "UNet2DConditionModel", BASE, "unet", "sdxl/unet",
        published="sdxl_unet", dtype="fp16", variant="fp16", size_bytes=5_134_927_368,
    ),
    Component(
        "refiner_unet", "diffusers", "UNet2DConditionModel", REFINER, "unet", "sdxl/refiner_unet",
        published="sdxl_refiner_unet", dtype="fp16", variant="fp16", size_bytes=4_519_053_320,
    ),
    Component(
        "scheduler", "diffusers", "EulerDiscreteScheduler", BASE, "scheduler",
        "sdxl/scheduler", published="sdxl_scheduler",
    ),
    Component(
        "refiner_scheduler", "diffusers", "EulerDiscreteScheduler", REFINER, "scheduler",
        "sdxl/refiner_scheduler", published="sdxl_scheduler",
    ),
)
# fmt: on

SDXL = Profile(
    name="sdxl",
    backend="sdxl",
    modes=("image",),
    folder="sdxl",
    components=SDXL_COMPONENTS,
    schedule=Schedule("DDIM", steps=25),
    phases=(Phase("single", 7.5),),
    placement=tuple(Placement(part.name, "card") for part in SDXL_COMPONENTS if part.dtype is not None),
    work_bytes=4_500_000_000,  # two 1024x1024 pictures with guidance, and one decode
    narrow_work_bytes=4_500_000_000,  # the UNets are never narrowed
    size_multiple=8,
    min_side=64,
    max_area=1024 * 1024,
    height=1024,
    width=1024,
)
