"""One component from its published files to ours: cast tensor by tensor, LoRAs merged, in execution order."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.hub import BakeFailed
from engine.linear8 import Linear8, quantise
from engine.lora import LoraWeights, check_covered, check_distinct, merge
from engine.parts import empty_model, file_name, frame, read_config, stored_dtype
from engine.profile import Component
from engine.published import differences, published_model
from engine.tensorfile import Spec, TensorFiles, TensorWriter

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
"""Every tensor that is stored, by the model's name, in the order of registration."""


def convert(component: Component, folder: Path, target: Path, loras: Sequence[tuple[LoraWeights, float]]) -> Path:
    """Write the component's tensors and configuration from `folder` into `target`; returns the tensor file.

    Each tensor is read, merged in fp32 with the `loras` at their strengths, cast or rounded to 8 bits once,
    and written. Memory: the largest tensor in fp32.

    Raises:
        BakeFailed: the files are not the class's tensors, or one is not finite after the cast.
        WeightsCorrupt: a LoRA does not fit.
    """
    model = empty_model(component, read_config(component, folder))
    shapes = stored_shapes(component, model)
    rounded = _rounded(component, model)
    files = TensorFiles(folder, component.variant)
    sources = _match(component, shapes, files)
    check_covered([lora for lora, _ in loras], set(shapes))
    check_distinct([lora for lora, _ in loras])
    shutil.copyfile(folder / "config.json", target / "config.json")
    names = execution_order(list(shapes))
    specs = {name: _specs(component, name, sources[name], shapes[name], name in rounded) for name in names}
    path = target / f"{stem(component)}.safetensors"
    with TensorWriter(path, [spec for name in names for spec in specs[name]]) as writer:
        for name in names:
            merged = merge(files.tensor(sources[name]).float(), name, loras)
            for spec, tensor in zip(specs[name], _stored(component, name, merged, specs[name]), strict=True):
                writer.write(spec.name, tensor)
    return path


def compare_with_published(component: Component, folder: Path) -> None:
    """Hold a fetched configuration against the one kept here: other shapes are another model.

    Values that moved are only said, because the worker follows the fetched file.

    Raises:
        BakeFailed: a tensor's name or shape differs.
    """
    fetched = stored_shapes(component, empty_model(component, read_config(component, folder)))
    if fetched != stored_shapes(component, published_model(component)):
        raise BakeFailed(
            f"{component.source.repo}: {component.name} is not the model that this profile was written for"
        )
    for difference in differences(component, json.loads((folder / "config.json").read_bytes())):
        log.warning("%s: published differently than kept here: %s", component.folder, difference)


def stored_shapes(component: Component, model: Any) -> Shapes:
    """The shapes of `model`'s tensors, without those that share another's storage."""
    tied = dict(component.tied)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def execution_order(names: Sequence[str]) -> list[str]:
    """A model's tensors in the order in which a forward needs them.

    That is the order of registration, with two exceptions: U-Nets register their middle after both sides, and
    Wan its final modulation before everything.
    """

    def rank(name: str) -> int:
        if name == "scale_shift_table":
            return 3
        side = name.split(".")[0]
        return {"mid_block": 1, "up_blocks": 2, "conv_norm_out": 3, "conv_out": 3}.get(side, 0)

    return sorted(names, key=rank)  # sorted is stable: within a rank the order of registration stays


def _rounded(component: Component, model: Any) -> set[str]:
    """The weights that the bake rounds to 8 bits, by the wide model's names. `model` becomes an 8-bit frame."""
    layers = frame(component, model).named_modules()
    return {f"{name}.weight" for name, layer in layers if isinstance(layer, Linear8)}


def _specs(component: Component, name: str, stored: str, shape: tuple[int, ...], is_rounded: bool) -> tuple[Spec, ...]:
    """What one of the model's tensors becomes in the file, where it is called `stored`."""
    if not is_rounded:
        return (Spec(stored, stored_dtype(component, name), shape),)
    parts = {"q": shape, "scale": shape[:1]}
    return tuple(Spec(f"{stored}_{part}", stored_dtype(component, f"{name}_{part}"), parts[part]) for part in parts)


def _stored(component: Component, name: str, merged: Tensor, specs: Sequence[Spec]) -> tuple[Tensor, ...]:
    """`merged`, fp32, as the specs say: cast, or rounded to 8 bits with one scale a row."""
    is_rounded = len(specs) > 1
    cast = merged if is_rounded else merged.to(specs[0].dtype)
    if not torch.isfinite(cast).all():
        raise BakeFailed(f"{component.folder}: {name} is not finite in {specs[0].dtype}")
    return quantise(cast, str(component.dtype)) if is_rounded else (cast,)


def stem(component: Component) -> str:
    """The file name that the library expects, so that its own from_pretrained reads a bake too."""
    return "diffusion_pytorch_model" if component.library == "diffusers" else "model"


def _match(component: Component, shapes: Shapes, files: TensorFiles) -> dict[str, str]:
    """For each tensor, the model's name -> the name in the files. None may be missing, spare or reshaped."""
    known = set(files.names())
    sources = {name: file_name(component, name, known) for name in shapes}
    tied = {file_name(component, name, known): sources[source] for name, source in component.tied}
    missing = set(sources.values()) - known
    # position_ids: a constant that old transformers releases wrote into their files
    spare = {name for name in known - {*sources.values(), *tied} if not name.endswith(".position_ids")}
    if missing or spare:
        raise BakeFailed(
            f"{component.source.repo}, {component.name}: {len(missing)} tensors are missing and {len(spare)} "
            f"unknown: {', '.join(sorted(missing | spare)[:4])}"
        )
    for name, stored in sources.items():
        if files.shape(stored) != shapes[name]:
            raise BakeFailed(f"{component.name}: {stored} is {files.shape(stored)}, not {shapes[name]}")
    for copy, stored in tied.items():
        if copy in known and not torch.equal(files.tensor(copy), files.tensor(stored)):
            raise BakeFailed(f"{component.name}: {copy} and {stored} should be one tensor and differ")
    return sources
