"""Compile a profile's blocks ahead, on a machine with the card that will serve, without the profile's weights.

All blocks of a transformer share one graph, so one block of the published size with drawn weights stands for all: less
than a gigabyte. It is compiled for the sizes that most requests have, run once for each, because kernels are tuned at
their first run, and what came of it is kept in WORKER_CACHE_DIR for the workers that read that folder.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from engine.activations import usual_shape
from engine.block_inputs import model_inputs
from engine.card import Card
from engine.compiling import Account
from engine.geometry import LatentShape
from engine.parts import empty_model, fill, frame, run_dtype
from engine.profile import Component, Profile
from engine.published import published_values
from engine.residency import runs_in
from engine.speed import Accelerated, accelerate, narrow
from schemas.errors import SettingsError

log = logging.getLogger(__name__)

TRANSFORMER = "transformer"  # a second expert is like the first
DEVIATION = 0.02  # of the drawn weights; finite results in bf16
SEED = 0


def warm_up(profile: Profile, card: Card, latents: Sequence[LatentShape]) -> Account:
    """Compile `profile`'s blocks for latents of these shapes and keep the graphs; returns what it cost.

    Raises:
        SettingsError: there is no card, compiling is turned off, a size could not be compiled, or no folder is set that
            can be written.
    """
    if card.levers.cache_dir is None:
        raise SettingsError("WORKER_CACHE_DIR is not set, so there is no place to keep compiled graphs")
    model = one_block(profile.component(TRANSFORMER), runs_in(profile, card.precision), card.device)
    return compile_ahead(accelerate([model], card.device, card.levers), latents, image_tokens(profile))


def compile_ahead(accelerated: Accelerated, latents: Sequence[LatentShape], image_tokens: int = 0) -> Account:
    """Compile, run and keep each size in turn.

    Raises:
        SettingsError: nothing can be compiled here, a size could not be, or what came of it could not be kept.
    """
    blocks = accelerated.blocks
    if blocks is None:
        raise SettingsError("compiling ahead needs the card that will serve, and WORKER_COMPILE not turned off")
    with torch.inference_mode():
        for latent in latents:
            accelerated.compile_for([latent], image_tokens)
            blocks.wait()
            accelerated.model(**model_inputs(accelerated.model, latent, blocks.device, image_tokens))
            log.info("compiled for %d tokens", latent.tokens)
    if blocks.notes:
        raise SettingsError("; ".join(blocks.notes))
    blocks.save()
    if not blocks.is_kept:
        raise SettingsError("what was compiled could not be written to WORKER_CACHE_DIR")
    return blocks.account


def usual_latents(profile: Profile) -> tuple[LatentShape, ...]:
    """Of the profile's default size: one shape, or with layouts two, because some add a latent for the end picture."""
    latent = usual_shape(profile).latent()
    return (latent,) if profile.layout is None else (latent._replace(frames=latent.frames + 1), latent)


def image_tokens(profile: Profile) -> int:
    """Of a picture's embedding; 0 if the profile has no image encoder."""
    encoders = [component for component in profile.components if component.name == "image_encoder"]
    if not encoders:
        return 0
    values = published_values(encoders[0])
    return int((values["image_size"] // values["patch_size"]) ** 2 + 1)


def one_block(component: Component, precision: str, device: str) -> Any:
    """The published transformer with one block and drawn weights, in `precision`, on `device`."""
    model = frame(component, empty_model(component, {**published_values(component), "num_layers": 1}))
    generator = None if device == "meta" else torch.Generator(device).manual_seed(SEED)
    state = {
        name: _draw(torch.empty(empty.shape, dtype=run_dtype(component, name, device), device=device), generator)
        for name, empty in model.state_dict().items()
    }
    fill(model, component, state, device)
    narrow(model, precision, device)
    return model


def _draw(tensor: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Weights that are baked in 8 bits are zeros: tuning a kernel only takes its time."""
    if tensor.dtype.itemsize == 1:
        tensor.view(torch.uint8).zero_()
        return tensor
    return tensor.normal_(0.0, DEVIATION, generator=generator)
