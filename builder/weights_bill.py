"""The weights' part of the bill of materials: what is baked, by its manifests, and what the table of profiles adds.

A baked folder and a LoRA is a machine-learning-model; its files are components inside it, with the sha256 of the
manifest. A LoRA that was merged is something the folder depends on.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from engine.bake import RECORD
from engine.hub import Lock
from engine.profile import Component
from engine.profiles import BAKES, PROFILES

Bill = dict[str, Any]


def weights(root: Path, lock: Lock) -> tuple[list[Bill], list[Bill]]:
    """Components and dependencies for the weights folder `root`, and for every profile that is not baked in it.

    Raises:
        KeyError, ValueError: a manifest or a component's record is not what the bake writes.
    """
    models: dict[str, Bill] = {}
    needs: dict[str, list[str]] = {}
    baked = [json.loads(path.read_bytes()) for path in sorted(root.glob("*/manifest.json"))]
    for manifest in baked:
        for folder, lines in _by_folder(manifest["files"]).items():
            record = root / folder / RECORD
            if record.is_file():
                found = _baked(folder, lines, json.loads(record.read_bytes()))
                models |= {one["bom-ref"]: one for one in found}
                needs[found[0]["bom-ref"]] = [one["bom-ref"] for one in found[1:]]
            else:
                models |= {one["bom-ref"]: one for one in map(_file, lines)}  # LoRAs that the bake was asked to keep
    for name in BAKES:
        if name not in {manifest["profile"] for manifest in baked}:
            found = _absent(name, lock)
            models = {one["bom-ref"]: one for one in found} | models  # what is shared may be baked by another profile
    return list(models.values()), [{"ref": ref, "dependsOn": sorted(on)} for ref, on in needs.items() if on]


def _by_folder(lines: list[Bill]) -> dict[str, list[Bill]]:
    folders: dict[str, list[Bill]] = {}
    for line in lines:
        folders.setdefault(line["path"].rpartition("/")[0], []).append(line)
    return folders


def _baked(folder: str, lines: list[Bill], record: Mapping[str, Any]) -> list[Bill]:
    """The model in `folder`, then the LoRAs that are merged into it."""
    recipe, commits, twin = record["recipe"], record["commits"], record["twin"]
    about = {
        "class": recipe["class"],
        "dtype": recipe["dtype"],
        "size_bytes": sum(line["size_bytes"] for line in lines),
    }
    model = _model(f"weights/{folder}", recipe["repo"], commits[recipe["repo"]], recipe["subfolder"], twin=twin)
    model |= {"scope": "required", "components": [_file(line) for line in lines], **_properties(**about, twin=twin)}
    loras = []
    for lora, digest in zip(recipe["loras"], record["loras_sha256"], strict=True):
        one = _lora(lora["repo"], commits[lora["repo"]], lora["file"], twin=twin)
        one |= {"scope": "required", "hashes": [{"alg": "SHA-256", "content": digest}]}
        loras.append(one | _properties(strength=lora["strength"], twin=twin))
    return [model, *loras]


def _absent(name: str, lock: Lock) -> list[Bill]:
    """What the profile would fetch: `optional` is the specification's word for what is not installed."""
    found = []
    for part in PROFILES[name].components:
        revision = lock.commits.get(part.source.repo, part.source.revision)
        model = _model(f"weights/{part.folder}", part.source.repo, revision, part.subfolder, twin=False)
        model |= {"scope": "optional", "components": list(_listed(part, lock))}
        found.append(
            model | _properties(**{"class": part.class_name, "dtype": part.dtype, "size_bytes": part.size_bytes})
        )
    for lora in PROFILES[name].loras:
        revision = lock.commits.get(lora.source.repo, lora.source.revision)
        one = _lora(lora.source.repo, revision, lora.file, twin=False)
        found.append(one | {"scope": "optional"} | _properties(strength=lora.strength))
    return found


def _listed(part: Component, lock: Lock) -> Iterator[Bill]:
    """The published files of a component, where the lock names them."""
    for file in lock.listings.get(part.source.repo, ()):
        if file.path.rpartition("/")[0] == part.subfolder:
            yield _file(
                {"path": f"{part.source.repo}/{file.path}", "size_bytes": file.size_bytes, "sha256": file.sha256}
            )


def _lora(repo: str, revision: str, file: str, *, twin: bool) -> Bill:
    return _model(f"lora/{repo}/{file}", repo, revision, file, twin=twin)


def _model(ref: str, repo: str, revision: str, inside: str, *, twin: bool) -> Bill:
    """`inside`: the folder or file of the repository. A twin is no published package, so it has no purl."""
    owner, _, name = repo.partition("/")
    model = {"type": "machine-learning-model", "bom-ref": ref, "group": owner, "name": name, "version": revision}
    if inside:
        model["description"] = inside
    if not twin:
        model["purl"] = f"pkg:huggingface/{repo}@{quote(revision, safe='')}" + (f"#{quote(inside)}" if inside else "")
    return model


def _file(line: Mapping[str, Any]) -> Bill:
    file = {"type": "file", "bom-ref": f"file/{line['path']}", "name": line["path"]}
    if line["sha256"] is not None:
        file["hashes"] = [{"alg": "SHA-256", "content": line["sha256"]}]
    return file | _properties(size_bytes=line["size_bytes"])


def _properties(**values: object) -> Bill:
    told = {name: value for name, value in values.items() if value not in (None, False)}
    return {"properties": [{"name": f"svi-worker:{name}", "value": str(value)} for name, value in told.items()]}
