"""The two-expert twin's models in tests of how they get to where they work."""

from pathlib import Path
from typing import Any

import torch

from engine.profiles import PROFILES
from tests.engine.test_parts import by_library

EXPERTS = {"high": "transformer", "low": "transformer_2"}
SMALL_LATENT = (2, 4, 4)


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_equal(model: Any, other: Any) -> None:
    mine, theirs = tensors(model), tensors(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def given(model: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    shape = (1, model.config.in_channels, *SMALL_LATENT)
    return {
        "hidden_states": torch.randn(shape, generator=generator).to(model.dtype),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 512, model.config.text_dim, generator=generator).to(model.dtype),
    }


@torch.inference_mode()
def forward(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(**given(model)).sample
    return out


def file_of(twins: Path, folder: str) -> Path:
    return next((twins / folder).glob("*.safetensors")).resolve()


def data_bytes(path: Path) -> int:
    """Of a file's tensors."""
    data = path.read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def by_the_library(name: str, twins: Path) -> Any:
    """A component of the two-expert twin, read by nothing of ours."""
    return by_library(PROFILES["wan22_i2v_svi"], name, twins)
