"""Each mode once at full size through ModelHandler, with random weights, under the memory of a 48 GB card.

    python bench/full_size.py [image] [video] [svi_endframe]      (a CUDA card; weights/tiny for the tokenizers)

Prints for every job: seconds by stage, forwards of each transformer, peak reserved memory, and the file's own facts.
The last line is the same as JSON. Random weights make noise; what is proven is that the whole path runs, and in how
much memory.
"""

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 the project's root must be on the path first
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from bench.random_parts import RandomParts  # noqa: E402
from engine import profiles, weights  # noqa: E402
from engine.backends import Task  # noqa: E402
from engine.progress import Progress  # noqa: E402
from engine.settings import Settings  # noqa: E402
from model_handler import ModelHandler  # noqa: E402
from schemas.input_schema import parse_request  # noqa: E402

CAP_GIB = 44.5
GIB = 2**30
HEAD = {"prompt": "the tide comes in at dusk", "seed": 7}
JOBS: dict[str, dict[str, Any]] = {
    "image": HEAD,
    "video": {**HEAD, "mode": "video", "height": 480, "width": 832, "num_inference_steps": 4, "image_url": "data:,"},
    "svi_endframe": {
        **HEAD, "mode": "svi_endframe", "resolution": "832x480", "image_start": "data:,", "image_end": "data:,",
    },
}  # fmt: skip


class CardParts(RandomParts):
    """Drawn on the card also where they are wanted on the host: drawing 14 billion numbers there takes minutes."""

    def load(self, name: str, device: str = "cpu") -> Any:
        part = super().load(name, "cuda")
        return part.to(device) if isinstance(part, torch.nn.Module) else part


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (480, 832, 3), dtype=np.uint8))


def measure(models: ModelHandler, mode: str, folder: Path) -> dict[str, Any]:
    request = parse_request(JOBS[mode])
    row = profiles.resolve(request)
    parts = CardParts(row, weights.locate(row, Settings(weights_dir=ROOT / "weights" / "tiny")).parts())
    pictures = {"image_url": picture(1)} if mode == "video" else {}
    if mode == "svi_endframe":
        pictures = {"image_start": picture(1), "image_end": picture(2)}
    forwards = count_forwards()
    torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    progress = Progress()
    made = models.generate(Task(row, request, 7, pictures), parts, folder, progress)
    file = dataclasses.asdict(made.files[0])
    return {
        "mode": mode,
        "seconds": round(time.monotonic() - started, 2),
        "timings_s": progress.timings_s,
        "forwards": forwards(),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "file": {
            k: v for k, v in file.items() if k in {"frames", "height", "width", "fps", "duration_s", "size_bytes"}
        },
        "notes": list(made.notes),
    }


def count_forwards() -> Any:
    """Calls of each transformer and UNet from here to the call of what is returned."""
    counts: dict[str, int] = {}

    def count(module: torch.nn.Module, *_: object) -> None:
        name = type(module).__name__
        if name in {"WanTransformer3DModel", "UNet2DConditionModel"}:
            counts[name] = counts.get(name, 0) + 1

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)

    def stop() -> dict[str, int]:
        handle.remove()
        return counts

    return stop


def main() -> None:
    models = ModelHandler(Settings(vram_gib=CAP_GIB))
    results = []
    for mode in sys.argv[1:] or list(JOBS):
        for _ in range(2):  # the first job loads
            with tempfile.TemporaryDirectory() as folder:
                results.append(measure(models, mode, Path(folder)))
            print(json.dumps(results[-1]), flush=True)
    card = torch.cuda.get_device_name()
    print(json.dumps({"card": card, "torch": torch.__version__, "cap_gib": CAP_GIB, "jobs": results}))


if __name__ == "__main__":
    main()
