"""The bake: published files in, one safetensors file a component out, and a manifest that proves every byte.

fetch -> merge LoRAs in fp32, then cast or round -> rename into place, a component at a time; the manifest last

A component appears under its final name whole or not at all, and a profile counts as baked when its manifest
is there. A bake that was cut goes on: finished components stay, a cut download resumes.
"""

import fcntl
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.convert import compare_with_published, convert
from engine.hub import BakeFailed, Hub, RemoteFile
from engine.lora import LoraWeights, check_expert, load_lora
from engine.profile import EXPERTS, Component, Lora, Profile, Source
from engine.tensorfile import weight_files
from engine.tokenizer import make_ready
from engine.weights import FORMAT, LORAS, MANIFEST, recipe, sha256
from schemas.errors import WeightsCorrupt

log = logging.getLogger(__name__)

STAGING = ".staging"  # in the weights folder, so that a rename never crosses a file system
RECORD = "component.json"


def bake(profile: Profile, hub: Hub, root: Path, *, twin: bool = False, keep_loras: bool = False) -> Path:
    """Bake `profile` into `root` and return its manifest. What is there already, the same and undamaged, is kept.

    In 8 bits it is `profile.baked_in(precision)`: another manifest, beside which the bf16 one may stand.

    `keep_loras`: leave the LoRA files beside the weights they are merged into, so that a request may ask for
    other strengths. For wan22_i2v_svi that is 4.9 GB more.

    Raises:
        BakeFailed: something could not be fetched, or is not what the profile describes.
        WeightsCorrupt: a LoRA file does not fit.
        OSError: the disk is full, say. What is finished stays, and the next bake goes on.
    """
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        _refuse_mixture(root, twin)
        records = {part.name: _component(part, profile, hub, root, twin) for part in profile.components}
        hashes = [digest for record in records.values() for digest in record["loras_sha256"]]
        if len(set(hashes)) < len(hashes):
            raise BakeFailed(f"two LoRAs of {profile.name} are the same file: one expert's stands in for the other's")
        kept = _keep_loras(profile, records, hub, root) if keep_loras else []
        path = root / profile.folder / MANIFEST
        _write_json(path, _manifest(profile, records, kept, twin))
        shutil.rmtree(root / STAGING, ignore_errors=True)
    return path


def needed_folders(profiles: Sequence[Profile]) -> dict[Source, list[str]]:
    """Every repository that the profiles are fetched from -> its folders that are read."""
    folders: dict[Source, dict[str, None]] = {}
    for profile in profiles:
        for component in profile.components:
            folders.setdefault(component.source, {})[component.subfolder] = None
        for lora in profile.loras:
            folders.setdefault(lora.source, {})[lora.file.rpartition("/")[0]] = None
    return {source: list(names) for source, names in folders.items()}


def needed_files(component: Component, listing: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Those of a published folder's files that the bake reads: a model's configuration and weights, else all.

    Raises:
        BakeFailed: the folder holds no safetensors weights.
    """
    if component.dtype is None:
        return list(listing)
    weights = weight_files([file.name for file in listing], component.variant)
    if not weights:
        place = component.subfolder or "its root"
        raise BakeFailed(f"{component.source.repo} has no safetensors weights in {place}")
    return [file for file in listing if file.name in {"config.json", *weights}]


def _component(component: Component, profile: Profile, hub: Hub, root: Path, twin: bool) -> dict[str, Any]:
    """Bake one component unless it is there already; returns its record."""
    sources = {component.source.repo: component.source}
    sources |= {lora.source.repo: lora.source for lora in profile.loras_of(component)}
    wanted = {
        "recipe": recipe(component, profile),
        "commits": {repo: hub.commit(source) for repo, source in sorted(sources.items())},
        "twin": twin,
    }
    target = root / component.folder
    record = _kept(target, wanted)
    if record is not None:
        log.info("%s: already baked", component.folder)
        return record
    staging = root / STAGING / component.folder
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    downloads = root / STAGING / "hub"
    loras = [(_fetch_lora(lora, hub, downloads), lora.strength) for lora in profile.loras_of(component)]
    published = _fetch(component, hub, downloads)
    log.info("%s: writing", component.folder)
    if component.dtype is None:
        shutil.copytree(published, staging, dirs_exist_ok=True)
        if component.class_name == "AutoTokenizer":
            make_ready(staging)
    else:
        if not twin:
            compare_with_published(component, published)
        convert(component, published, staging, loras)
    hashes = [lora.sha256 for lora, _ in loras]
    record = {**wanted, "loras_sha256": hashes, "files": _files(staging, component.folder)}
    _write_json(staging / RECORD, record)
    _replace(staging, target, root)
    shutil.rmtree(published)  # the big models are published in fp32, at twice the size
    return record


def _fetch(component: Component, hub: Hub, downloads: Path) -> Path:
    """Fetch what the component needs of its published folder; returns the folder that it is in."""
    folder = downloads / component.source.repo / component.subfolder
    for file in needed_files(component, hub.files(component.source, component.subfolder)):
        log.info("%s: fetching %s, %d bytes", component.folder, file.path, file.size_bytes)
        hub.fetch(component.source, file, folder / file.name)
    return folder


def _fetch_lora(lora: Lora, hub: Hub, downloads: Path) -> LoraWeights:
    """Fetch a LoRA and make sure that it is the right one for its expert."""
    listing = {file.path: file for file in hub.files(lora.source, lora.file.rpartition("/")[0])}
    if lora.file not in listing:
        raise BakeFailed(f"{lora.source.repo} has no {lora.file}")
    target = downloads / lora.source.repo / lora.file
    log.info("fetching %s", lora.file)
    hub.fetch(lora.source, listing[lora.file], target)
    weights = load_lora(target)
    if lora.sha256 not in (None, weights.sha256):
        raise BakeFailed(f"{lora.file} is not the file that the profile names; its sha256 is {weights.sha256}")
    check_expert(weights, lora.expert, {})
    return weights


def _keep_loras(
    profile: Profile, records: Mapping[str, Mapping[str, Any]], hub: Hub, root: Path
) -> list[dict[str, Any]]:
    """Put the LoRA files, numbered as in the profile, where engine.parts looks for them; returns their lines.

    `records`: of the components, which say what was merged. Files of these hashes that are there stay.
    """
    target = root / profile.folder / LORAS
    merged = {EXPERTS[lora.expert]: iter(records[EXPERTS[lora.expert]]["loras_sha256"]) for lora in profile.loras}
    wanted = {f"{i}.safetensors": next(merged[EXPERTS[lora.expert]]) for i, lora in enumerate(profile.loras)}
    if target.is_dir() and {path.name: sha256(path) for path in target.iterdir()} == wanted:
        return _files(target, f"{profile.folder}/{LORAS}")
    staging = root / STAGING / profile.folder / LORAS
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for i, lora in enumerate(profile.loras):
        _fetch_lora(lora, hub, root / STAGING / "hub")
        shutil.copy(root / STAGING / "hub" / lora.source.repo / lora.file, staging / f"{i}.safetensors")
    _replace(staging, target, root)
    return _files(target, f"{profile.folder}/{LORAS}")


def _manifest(
    profile: Profile, records: Mapping[str, Mapping[str, Any]], kept: list[dict[str, Any]], twin: bool
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "profile": profile.name,
        "twin": twin,
        "components": {
            name: {key: record[key] for key in ("recipe", "commits", "loras_sha256")}
            for name, record in records.items()
        },
        "files": [*(line for record in records.values() for line in record["files"]), *kept],
    }


def _files(folder: Path, name: str) -> list[dict[str, Any]]:
    """Lines of the manifest for every file in a component's folder."""
    return [
        {"path": f"{name}/{path.name}", "size_bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
    ]


def _kept(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a finished component, if it is what is wanted and every file of it has its hash."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
        hashes = {line["path"].rpartition("/")[2]: line["sha256"] for line in record["files"]}
        if not wanted.items() <= record.items():
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    try:
        damaged = [name for name, digest in hashes.items() if sha256(folder / name) != digest]
    except WeightsCorrupt:  # one is gone
        return None
    return None if damaged else record


def _replace(staging: Path, target: Path, root: Path) -> None:
    """Put a finished component in its place. Manifests that spoke of its predecessor go first."""
    folder = target.relative_to(root).as_posix()
    for path, manifest in _manifests(root):
        if any(line["path"].startswith(f"{folder}/") for line in manifest["files"]):
            path.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(root / STAGING / "replaced", ignore_errors=True)
        target.replace(root / STAGING / "replaced")
    staging.replace(target)


def _refuse_mixture(root: Path, twin: bool) -> None:
    for path, manifest in _manifests(root):
        if manifest["twin"] != twin:
            holds = "real weights" if twin else "tiny twins"
            raise BakeFailed(f"the folder holds {holds} ({path.parent.name}); use another one")


def _manifests(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Those in `root`. One that cannot be read proves nothing, and would stand in the way of a new one: it goes."""
    found = []
    for path in sorted(root.glob(f"*/{MANIFEST}")):
        try:
            manifest = json.loads(path.read_bytes())
            found.append((path, {key: manifest[key] for key in ("twin", "files")}))
        except (ValueError, KeyError, TypeError):
            log.warning("%s of %s cannot be read and is removed", MANIFEST, path.parent.name)
            path.unlink()
    return found


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the folder's lock: a second bake waits, and then finds everything done."""
    with (root / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)
