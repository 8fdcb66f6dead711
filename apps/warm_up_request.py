"""The request that a worker gives itself before it takes any: at its mode's usual size, in two steps of each model.

Two steps are enough: each expert of a video runs, each UNet of a picture is recorded, and all sizes are those of a
default job, so what is loaded and tried out for it is what the next one needs. A distilled model takes no fewer than
its own.
"""

import base64
import io
from typing import Any

from schemas.video_schema import LIGHTNING, LIGHTNING_STEPS

PROMPT = "the tide comes in at dusk"
STEPS = 2  # one of each expert; a UNet's second forward is the first that engine.replay records
REFINER_STEPS = 7  # of which the default strength, 0.3, runs two
HEIGHT, WIDTH = 480, 832


def warm_up_request(wanted: str) -> dict[str, Any]:
    """The payload for a mode, or for `mode:model_type`, as a client would post it.

    Raises:
        KeyError: there is no such mode.
    """
    mode, _, model_type = wanted.partition(":")
    picture, steps = _picture(), LIGHTNING_STEPS[0] if model_type == LIGHTNING else STEPS
    given: dict[str, dict[str, Any]] = {
        "image": {"num_inference_steps": STEPS, "refiner_inference_steps": REFINER_STEPS},
        "video": {"image_url": picture, "num_inference_steps": steps},
        "svi_endframe": {"image_start": picture, "image_end": picture, "num_inference_steps": STEPS},
    }
    chosen = {"model_type": model_type} if model_type else {}
    return {"mode": mode, "prompt": PROMPT, "seed": 0, **given[mode], **chosen}


def _picture() -> str:
    """A slope from dark to light, as a data URI."""
    from PIL import Image

    file = io.BytesIO()
    Image.linear_gradient("L").resize((WIDTH, HEIGHT)).convert("RGB").save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
