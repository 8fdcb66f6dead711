"""LoRA files: read with no key lost, checked against the model and the expert, merged in fp32.

Merging by our own arithmetic replaces diffusers' loader (0.42.1), which loads nothing from the SVI authors'
files without an error, drops norm and modulation deltas, and fuses only the first of two transformers.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.lora_keys import target
from schemas.errors import WeightsCorrupt

Expert = Literal["high", "low"]


@dataclass(frozen=True)
class LowRank:
    """A delta as two thin matrices: scale * up @ down."""

    down: Tensor
    """(rank, in), the file's dtype."""
    up: Tensor
    """(out, rank), the file's dtype."""
    scale: float
    """alpha / rank; 1.0 where the file holds no alpha."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.up.shape[0], self.down.shape[1]))

    def dense(self) -> Tensor:
        """The delta at strength 1, fp32, in the parameter's shape."""
        return self.scale * (self.up.float() @ self.down.float())


@dataclass(frozen=True)
class Full:
    """A delta that is stored whole: biases, norms, the head."""

    delta: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.delta.shape

    def dense(self) -> Tensor:
        """The delta at strength 1, fp32, in the parameter's shape."""
        return self.delta.float()


@dataclass(frozen=True)
class LoraWeights:
    """One LoRA file in the model's own names."""

    name: str
    """The file's name, for messages and for the expert that it names."""
    sha256: str
    deltas: dict[str, LowRank | Full]
    """Parameter name of WanTransformer3DModel, such as blocks.0.attn1.to_q.weight -> its delta."""
    keys: dict[str, str]
    """Parameter name -> one key of the file that it came from, for messages."""
    metadata: dict[str, str] = field(default_factory=dict)


def load_lora(path: Path) -> LoraWeights:
    """Read a LoRA in any of the three published key styles. Tensors stay on the CPU, in the file's dtype.

    Raises:
        WeightsCorrupt: not safetensors, no LoRA in it, a key with no place in the model, or half a delta.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise WeightsCorrupt(f"{path.name} is not a readable safetensors file") from error
    deltas, keys = _deltas(path.name, tensors)
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return LoraWeights(path.name, sha256, deltas, keys, metadata)


def merge(weight: Tensor, name: str, loras: Sequence[tuple[LoraWeights, float]]) -> Tensor:
    """Add every delta of parameter `name`, times its strength, to `weight`: fp32 sum, one cast back.

    Returns `weight` itself when no LoRA changes this parameter.

    Raises:
        WeightsCorrupt: a delta's shape is not the weight's, or the sum is not finite.
        ValueError: the weight is quantised already.
    """
    parts = [(lora, strength, lora.deltas[name]) for lora, strength in loras if name in lora.deltas]
    if not parts:
        return weight
    if not weight.is_floating_point() or weight.itemsize < 2:
        raise ValueError(f"{name} is {weight.dtype}: merge before quantising")
    total = weight.float()
    for lora, strength, delta in parts:
        if delta.shape != weight.shape:
            raise WeightsCorrupt(
                f"{lora.name}: {lora.keys[name]} changes {name} by {tuple(delta.shape)}, "
                f"but the weight is {tuple(weight.shape)}"
            )
        total = total + strength * delta.dense().to(total.device)
    if not torch.isfinite(total).all():
        raise WeightsCorrupt(f"{name} is not finite after merging {', '.join(lora.name for lora, _, _ in parts)}")
    return total.to(weight.dtype)


def check_covered(loras: Sequence[LoraWeights], names: set[str]) -> None:
    """Refuse a LoRA that the model has no place for, wholly or in part. `names`: the model's parameter names.

    Raises:
        WeightsCorrupt: names the file, its keys and the parameters that they would change.
    """
    for lora in loras:
        missing = sorted(name for name in lora.deltas if name not in names)
        if missing:
            shown = "; ".join(f"{lora.keys[name]} -> {name}" for name in missing[:4])
            raise WeightsCorrupt(f"{lora.name}: {len(missing)} of {len(lora.deltas)} deltas have no parameter: {shown}")


def identify_expert(lora: LoraWeights, known: Mapping[str, Expert]) -> Expert:
    """Which expert a file was made for; the two files of a pair have the same keys and sizes.

    Three witnesses are heard: the content (`known`: sha256 -> expert, from the profile or its lock), the
    file's metadata (`expert`) and its name. At least one must speak, and all that speak must agree.

    Raises:
        WeightsCorrupt: nobody speaks, or two disagree.
    """
    witnesses = {
        "its sha256": known.get(lora.sha256),
        "its metadata": _expert_word(lora.metadata.get("expert", "")),
        "its name": _expert_word(lora.name),
    }
    said = {witness: word for witness, word in witnesses.items() if word is not None}
    if not said:
        raise WeightsCorrupt(
            f"{lora.name}: nothing says for which expert; put high or low into its name, or list its sha256"
        )
    if len(set(said.values())) > 1:
        words = ", ".join(f"{witness} says {word}" for witness, word in said.items())
        raise WeightsCorrupt(f"{lora.name}: {words}; the files were swapped or renamed")
    return next(iter(said.values()))


def check_expert(lora: LoraWeights, expert: Expert, known: Mapping[str, Expert]) -> None:
    """Refuse a file that was made for the other expert.

    Raises:
        WeightsCorrupt: it was, or nothing says so.
    """
    found = identify_expert(lora, known)
    if found != expert:
        raise WeightsCorrupt(f"{lora.name} is for the {found}-noise expert, not the {expert}-noise one")


def check_distinct(loras: Sequence[LoraWeights]) -> None:
    """Refuse one file under two names: the two experts' files never hold the same bytes.

    Raises:
        WeightsCorrupt: names both files.
    """
    seen: dict[str, str] = {}
    for lora in loras:
        if lora.sha256 in seen:
            raise WeightsCorrupt(f"{seen[lora.sha256]} and {lora.name} are the same file")
        seen[lora.sha256] = lora.name


def _expert_word(text: str) -> Expert | None:
    lowered = text.lower()
    high, low = "high" in lowered, "low" in lowered.replace("flow", "")
    if high == low:
        return None
    return "high" if high else "low"


def _deltas(file: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, LowRank | Full], dict[str, str]]:
    parts: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, str] = {}
    unmatched = []
    for key, tensor in tensors.items():
        found = target(key)
        if found is None:
            unmatched.append(key)
            continue
        mine = parts.setdefault(found.parameter, {})
        if found.part in mine:
            raise WeightsCorrupt(
                f"{file}: {keys[found.parameter]} and {key} are both {found.part} of {found.parameter}"
            )
        mine[found.part] = tensor
        keys.setdefault(found.parameter, key)
    if unmatched:
        shown = ", ".join(sorted(unmatched)[:4])
        raise WeightsCorrupt(f"{file}: {len(unmatched)} of {len(tensors)} keys have no place in the model: {shown}")
    if not parts:
        raise WeightsCorrupt(f"{file} holds no tensors")
    return {name: _delta(file, name, mine) for name, mine in parts.items()}, keys


def _delta(file: str, name: str, parts: Mapping[str, Tensor]) -> LowRank | Full:
    given = set(parts)
    if given == {"diff"} or given == {"bias"}:
        (delta,) = parts.values()
        return Full(delta)
    if given not in ({"down", "up"}, {"down", "up", "alpha"}):
        raise WeightsCorrupt(f"{file}: the delta of {name} is {', '.join(sorted(given))}; it needs down and up")
    down, up = parts["down"], parts["up"]
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0] or not down.shape[0]:
        raise WeightsCorrupt(f"{file}: {name} is {tuple(up.shape)} times {tuple(down.shape)}, not two thin matrices")
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise WeightsCorrupt(f"{file}: alpha of {name} is not one number")
    scale = parts["alpha"].item() / down.shape[0] if "alpha" in parts else 1.0
    return LowRank(down, up, scale)
