"""A bake of random numbers: the files that a worker reads, in their full size, where no real weights are.

Names, shapes, dtypes, order and manifest are the bake's; only the values are drawn, so that a forward stays finite.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.kept import keep
from bench.random_parts import DEVIATION, FILM_DEVIATION, deviation
from engine.convert import execution_order, stem, stored_shapes
from engine.parts import empty_model, frame, read_config, stored_dtype
from engine.profile import Component, Profile
from engine.published import published_model, published_values
from engine.tensorfile import Spec, TensorWriter
from engine.weights import FORMAT, MANIFEST, recipe

SPREAD = 40.0  # standard deviation of 8-bit numbers: three of them fit int8, and all of them fp8


def write_bake(profile: Profile, root: Path, twins: Path, *, is_small: bool = False) -> list[Path]:
    """Write `profile` below `root` as a bake would lie there, if it does not yet; returns its tensor files.

    `is_small`: in the sizes of its tiny twin. Tokenizers and schedulers come from `twins`, which a bf16 bake made.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    manifest = root / profile.folder / MANIFEST
    if not manifest.is_file() or json.loads(manifest.read_bytes()).get("film_deviation") != FILM_DEVIATION:
        for component in profile.components:
            _write_component(component, root / component.folder, twins, device, is_small)
        keep(manifest, _manifest(profile, root, is_small))
    return [next((root / part.folder).glob("*.safetensors")) for part in profile.components if part.dtype]


def _write_component(component: Component, target: Path, twins: Path, device: str, is_small: bool) -> None:
    if component.dtype is None:
        shutil.copytree(twins / component.folder, target, dirs_exist_ok=True)
        return
    target.mkdir(parents=True, exist_ok=True)
    wide = _wide_folder(component, twins)
    if is_small:
        model = frame(component, empty_model(component, read_config(component, wide)))
        shutil.copyfile(wide / "config.json", target / "config.json")
    else:
        model = frame(component, published_model(component))
        (target / "config.json").write_text(json.dumps(published_values(component)))
    shapes = stored_shapes(component, model)
    specs = [Spec(name, stored_dtype(component, name), shapes[name]) for name in execution_order(list(shapes))]
    with TensorWriter(target / f"{stem(component)}.safetensors", specs) as writer:
        for spec, value in _drawn(component, specs, device):
            writer.write(spec.name, value)
    (target / "component.json").write_text("{}")  # what tells a bake from a published folder


def _drawn(component: Component, specs: list[Spec], device: str) -> Iterator[tuple[Spec, torch.Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    for spec in specs:
        wide = torch.empty(spec.shape, dtype=torch.float32, device=device)
        yield spec, _fill(wide, component, spec, generator).to(spec.dtype).cpu()


def _fill(wide: torch.Tensor, component: Component, spec: Spec, generator: torch.Generator) -> torch.Tensor:
    """Norms are 1, biases 0, all else is normal as RandomParts draws it; in 8 bits that is number times scale."""
    module, _, kind = spec.name.rpartition(".")
    if kind == "weight_q":
        return wide.normal_(0.0, SPREAD, generator=generator).clamp_(-127, 127)
    if kind == "weight_scale":
        return wide.fill_(DEVIATION / SPREAD)
    if kind == "bias":
        return wide.zero_()
    if kind == "gamma" or "norm" in module.rpartition(".")[2]:
        return wide.fill_(1.0)
    return wide.normal_(0.0, deviation(component, spec.name), generator=generator)


def _wide_folder(component: Component, twins: Path) -> Path:
    """The twin's folder of the same component in bf16."""
    name = component.folder
    for precision in ("fp8", "int8"):
        name = name.replace(f"-{precision}", "")
    return twins / name


def _manifest(profile: Profile, root: Path, is_twin: bool) -> dict[str, Any]:
    files = [path for part in profile.components for path in sorted((root / part.folder).iterdir())]
    return {
        "format": FORMAT,
        "profile": profile.name,
        "twin": is_twin,
        "film_deviation": FILM_DEVIATION,  # a kept bake of another one is written anew
        "components": {part.name: {"recipe": recipe(part, profile)} for part in profile.components},
        "files": [
            {"path": path.relative_to(root).as_posix(), "size_bytes": path.stat().st_size, "sha256": ""}
            for path in files
        ],
    }
