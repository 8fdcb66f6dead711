"""Requests that are right, by mode: the least, and one with every field set."""

from typing import Any

LEAST: dict[str, dict[str, Any]] = {
    "image": {"prompt": "a red fox"},
    "video": {"mode": "video", "image_url": "iVBORw0KGgo="},
    "svi_endframe": {"mode": "svi_endframe", "image_start": "iVBORw0KGgo=", "image_end": "/9j/4AAQSkZJRg=="},
}

PAPER_TASK = {
    "mode": "svi_endframe",
    "model_type": "wan_2_2_i2v_lightning_svi_3_3",
    "prompt": "A smooth cinematic transition between scenes",
    "image_start": "https://your-bucket.supabase.co/path/to/start.png",
    "image_end": "https://your-bucket.supabase.co/path/to/end.png",
    "image_refs": ["https://your-bucket.supabase.co/path/to/start.png"],
    "video_prompt_type": "I",
    "video_length": 81,
    "resolution": "768x576",
}
"""The task of the requirement paper on SVI with end frame, its anchor "usually same as image_start"."""

FULL: dict[str, dict[str, Any]] = {
    "image": {
        "mode": "image",
        "prompt": "a red fox\nin snow",
        "negative_prompt": "blur",
        "image_url": "data:image/png;base64,iVBORw0KGgo=",
        "height": 768,
        "width": 1360,
        "seed": 0,
        "scheduler": "DPMSolverSinglestep",
        "num_inference_steps": 30,
        "refiner_inference_steps": 40,
        "guidance_scale": 6,
        "refiner_guidance_scale": 4.5,
        "strength": 1,
        "num_images": 4,
        "high_noise_frac": 0.8,
        "output_format": "webp",
        "quality": 80,
    },
    "video": {
        "mode": "i2v",
        "model_type": "wan21_i2v_480p",
        "image_url": "http://example.com/a.jpg?signature=x",
        "prompt": "Кошка 猫 🐈",
        "negative_prompt": "blur",
        "num_frames": 49,
        "fps": 24,
        "height": 480,
        "width": 832,
        "num_inference_steps": 30,
        "guidance_scale": 3.5,
        "seed": 2**63 - 1,
    },
    "svi_endframe": {
        **PAPER_TASK,
        "negative_prompt": "blur",
        "svi2pro": True,
        "layout": "svi_latent",
        "video_length": 225,
        "segments": 3,
        "overlap": 8,
        "fps": 24,
        "frame_policy": "window",
        "lock_end": False,
        "empty_frames": "noise",
        "num_inference_steps": 8,
        "guidance_scale": 3,
        "guidance2_scale": 1.0,
        "flow_shift": 5,
        "high_steps": 3,
        "low_steps": 5,
        "loras_multipliers": "1;0 0;1 1.2;0 0;1",
        "seed": 12345,
        "return_state": True,
        "state": "U1ZJUw==",
    },
}
"""Every field but those that exclude others: prompts, prefix_video, switch_threshold."""
