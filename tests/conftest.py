"""What every test stands on: a clean environment, the tiny twins, pictures made on the spot."""

import base64
import gc
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
TWINS = ROOT / "weights" / "tiny"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the caller's own settings."""
    import os

    for name in list(os.environ):
        if name.startswith(("WORKER_", "BUCKET_", "RUNPOD_")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module", autouse=True)
def libraries_are_no_garbage() -> None:
    """What the collection of the tests has imported stays, and each look for garbage would take a second to pass it.

    Anew for each file: some tests unfreeze, and some import more.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def twins() -> Path:
    """The folder of the tiny twins, built by the project's own bake if `make twins` has not run."""
    if not (TWINS / ".ready").exists():
        subprocess.run([sys.executable, ROOT / "download_weights.py", "--tiny", "--output", TWINS], check=True)
    return TWINS


@pytest.fixture
def settings(twins: Path, tmp_path: Path) -> Settings:
    """Settings of a machine without S3, its files in a folder of the test's own."""
    return Settings(weights_dir=twins, output_dir=tmp_path / "output", outbox_dir=tmp_path / "outbox")


def photo(height: int = 96, width: int = 128, seed: int = 0) -> Image.Image:
    """A picture with gradients and grain, so that nothing about it is constant."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (height + width)], axis=-1)
    return Image.fromarray(np.clip(base + rng.normal(0, 12, base.shape), 0, 255).astype(np.uint8))


def data_uri(image: Image.Image, kind: str = "png") -> str:
    """The picture as clients send it."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def decode_video(path: str | Path) -> np.ndarray:
    """Every frame of a video, (F, H, W, 3) uint8."""
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture
def worker(settings: Settings) -> Iterator[Any]:
    """A worker as handler.main() builds it."""
    from handler import Worker
    from model_handler import ModelHandler

    worker = Worker(settings, ModelHandler(settings))
    yield worker
    worker.models.unload_all()
