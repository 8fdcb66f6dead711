"""The bill of materials: whole, valid by CycloneDX's own schema, and with the weights' hashes."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from builder import write_sbom
from builder.lockfile import normalised
from builder.weights_bill import weights
from engine.hub import Lock, RemoteFile
from engine.profiles import BAKES, PROFILES
from engine.settings import ROOT
from tests.test_image_files import found, is_sent, steps

NOWHERE = Path("/nonexistent")


@pytest.fixture(scope="module")
def document(twins: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The bill of this environment and of the twins, as the command writes it."""
    path = tmp_path_factory.mktemp("sbom") / "build" / "sbom.cdx.json"
    assert write_sbom.main(["--weights", str(twins), "--output", str(path)]) == 0
    return json.loads(path.read_bytes())


def of(document: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [one for one in document["components"] if one["type"] == kind]


def told(component: dict[str, Any]) -> dict[str, str]:
    return {one["name"].removeprefix("svi-worker:"): one["value"] for one in component["properties"]}


def complaint(document: dict[str, Any]) -> str | None:
    """What CycloneDX 1.5's schema says against the document."""
    error = JsonStrictValidator(SchemaVersion.V1_5).validate_str(json.dumps(document))
    return None if error is None else str(error.data.message)


def test_bill_is_valid(document: dict[str, Any]) -> None:
    assert complaint(document) is None


@pytest.mark.parametrize("spoil", ["type", "name"])
def test_validator_notices_what_is_required(document: dict[str, Any], spoil: str) -> None:
    first, *rest = document["components"]
    short = {key: value for key, value in first.items() if key != spoil}
    assert complaint({**document, "components": [short, *rest]}) == f"{spoil!r} is a required property"


def test_every_reference_is_to_one_component(document: dict[str, Any]) -> None:
    nested = [inside for one in document["components"] for inside in one.get("components", ())]
    refs = [one["bom-ref"] for one in [*document["components"], *nested]]
    assert len(set(refs)) == len(refs)
    used = {ref for row in document["dependencies"] for ref in [row["ref"], *row["dependsOn"]]}
    assert used <= set(refs)


def test_every_installed_package_is_listed(document: dict[str, Any]) -> None:
    listed = {one["name"]: one["version"] for one in of(document, "library") if one["purl"].startswith("pkg:pypi/")}
    here = {normalised(one.metadata["Name"]) for one in distributions()}
    assert listed.keys() == here
    assert listed["boto3"] == "1.44.5"


def test_missing_package_would_be_noticed(document: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    packages = write_sbom.installed()
    monkeypatch.setattr(write_sbom, "installed", lambda: [one for one in packages if one.name != "boto3"])
    names = {one["name"] for one in write_sbom.bill(NOWHERE, Lock(), NOWHERE)["components"]}
    assert {one["name"] for one in of(document, "library")} - names >= {"boto3"}


def test_licences_are_expressions_or_the_packages_own_words(document: dict[str, Any]) -> None:
    found = {one["name"]: one.get("licenses") for one in of(document, "library")}
    assert found["numpy"] == [{"expression": "BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0"}]
    assert found["diffusers"] == [{"license": {"name": "Apache 2.0 License"}}]
    assert found["scipy"] == [{"license": {"name": "BSD License"}}]  # its metadata holds the whole text


def test_needs_of_a_package_are_told(document: dict[str, Any]) -> None:
    needs = {row["ref"]: row["dependsOn"] for row in document["dependencies"]}
    assert needs["pkg:pypi/ftfy@6.3.1"] == ["pkg:pypi/wcwidth@0.9.4"]


def test_baked_files_are_listed_with_the_manifests_hashes(document: dict[str, Any], twins: Path) -> None:
    inside = [file for one in of(document, "machine-learning-model") for file in one.get("components", ())]
    listed = {file["name"]: file["hashes"] for file in [*inside, *of(document, "file")]}
    lines = [line for path in twins.glob("*/manifest.json") for line in json.loads(path.read_bytes())["files"]]
    assert {line["path"]: [{"alg": "SHA-256", "content": line["sha256"]}] for line in lines} == listed


def test_model_tells_its_repository_commit_and_size(document: dict[str, Any], twins: Path) -> None:
    (unet,) = [one for one in of(document, "machine-learning-model") if one["bom-ref"] == "weights/sdxl/unet"]
    manifest = json.loads((twins / "sdxl" / "manifest.json").read_bytes())
    commit = manifest["components"]["unet"]["commits"]["stabilityai/stable-diffusion-xl-base-1.0"]
    assert (unet["group"], unet["name"], unet["version"]) == ("stabilityai", "stable-diffusion-xl-base-1.0", commit)
    size = sum(line["size_bytes"] for line in manifest["files"] if line["path"].startswith("sdxl/unet/"))
    assert told(unet) == {"class": "UNet2DConditionModel", "dtype": "fp16", "size_bytes": str(size), "twin": "True"}


def test_twin_passes_for_no_published_package(document: dict[str, Any]) -> None:
    models = of(document, "machine-learning-model")
    assert {one["scope"] for one in models} == {"required"}
    assert not [one for one in models if "purl" in one]


def test_merged_loras_are_what_the_expert_depends_on(document: dict[str, Any], twins: Path) -> None:
    (row,) = [row for row in document["dependencies"] if row["ref"] == "weights/wan22_i2v_svi/transformer"]
    refs = {f"lora/{one.source.repo}/{one.file}" for one in PROFILES["wan22_i2v_svi"].loras if one.expert == "high"}
    assert set(row["dependsOn"]) == refs
    record = json.loads((twins / "wan22_i2v_svi" / "transformer" / "component.json").read_bytes())
    found = {one["bom-ref"]: one for one in of(document, "machine-learning-model")}
    assert {found[ref]["hashes"][0]["content"] for ref in refs} == set(record["loras_sha256"])


def test_profile_that_is_not_baked_is_optional_and_says_its_branch(twins: Path, tmp_path: Path) -> None:
    shutil.copytree(twins / "sdxl", tmp_path / "sdxl")
    models, _ = weights(tmp_path, Lock())
    scopes = {one["bom-ref"]: one["scope"] for one in models if one["type"] == "machine-learning-model"}
    assert scopes["weights/sdxl/unet"] == "required"
    assert scopes["weights/wan21_i2v_480p/transformer"] == "optional"
    (wan,) = [one for one in models if one["bom-ref"] == "weights/wan21_i2v_480p/transformer"]
    assert wan["purl"] == "pkg:huggingface/Wan-AI/Wan2.1-I2V-14B-480P-Diffusers@main#transformer"
    assert wan["components"] == []


def test_locked_repository_is_told_by_commit_and_hash(tmp_path: Path) -> None:
    repo, commit, digest = "Wan-AI/Wan2.2-I2V-A14B-Diffusers", "0123456789abcdef" * 2 + "01234567", "ab" * 32
    file = RemoteFile("transformer/config.json", 448, sha256=digest)
    models, _ = weights(tmp_path, Lock({repo: commit}, {repo: (file,)}))
    (model,) = [one for one in models if one["bom-ref"] == "weights/wan22_i2v_svi/transformer"]
    assert model["version"] == commit
    assert [one["hashes"] for one in model["components"]] == [[{"alg": "SHA-256", "content": digest}]]


def test_every_profile_is_in_the_bill_whether_baked_or_not(tmp_path: Path) -> None:
    models, _ = weights(tmp_path, Lock())
    listed = {one["bom-ref"] for one in models}
    assert {f"weights/{part.folder}" for name in BAKES for part in PROFILES[name].components} <= listed


def test_debian_packages_are_listed_where_there_is_a_dpkg(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text(
        "Package: tini\nStatus: install ok installed\nArchitecture: amd64\nVersion: 0.19.0-1\nDescription: an init\n"
        " Package: inside a description\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1:2.0+b1\n"
    )
    document = write_sbom.bill(tmp_path, Lock(), status)
    debian = [one for one in document["components"] if one.get("purl", "").startswith("pkg:deb/")]
    assert [(one["name"], one["purl"]) for one in debian] == [("tini", "pkg:deb/debian/tini@0.19.0-1?arch=amd64")]


@pytest.mark.soak
def test_image_holds_what_writes_its_bill(tmp_path: Path) -> None:
    """The command of the Dockerfile, in a folder with the files that the build is sent and nothing else."""
    sent = [path for path in found(".") if is_sent(path)]
    for path in sent:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (step,) = [step for step in steps("RUN", "worker") if "builder/write_sbom.py" in step.words]
    bare = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    subprocess.run([sys.executable, *step.words[1:]], cwd=tmp_path, env=bare, check=True)
    document = json.loads((tmp_path / "sbom.cdx.json").read_bytes())
    assert complaint(document) is None
    assert "runpod" in {one["name"] for one in document["components"]}
