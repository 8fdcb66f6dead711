"""The bake: exact bytes, LoRAs where they belong, and nothing half-done under a final name."""

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.bake import bake, needed_files, needed_folders
from engine.hub import BakeFailed, FolderHub, RemoteFile
from engine.lora import load_lora
from engine.profile import Lora, Profile, Source
from engine.profiles import BAKES, PROFILES
from engine.settings import Settings
from engine.tokenizer import READY
from engine.weights import locate
from schemas.errors import WeightsCorrupt, WeightsMissing

SDXL, WAN21, SVI, LIGHTNING = (PROFILES[name] for name in BAKES)
STEM = "diffusion_pytorch_model.safetensors"


@dataclass
class Watched:
    """A folder of repositories that counts what is fetched, and breaks when told to."""

    hub: FolderHub
    fetched: list[str] = field(default_factory=list)
    breaks_at: str | None = None

    def commit(self, source: Source) -> str:
        return self.hub.commit(source)

    def files(self, source: Source, folder: str) -> list[RemoteFile]:
        return self.hub.files(source, folder)

    def fetch(self, source: Source, file: RemoteFile, target: Path) -> None:
        if f"{source.repo}/{file.path}" == self.breaks_at:
            raise BakeFailed("cut")
        self.fetched.append(file.path)
        self.hub.fetch(source, file, target)


@pytest.fixture
def spoilt(upstream: Path, tmp_path: Path) -> Path:
    """Repositories that a test may change."""
    return Path(shutil.copytree(upstream, tmp_path / "upstream"))


def shards(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_bake_writes_every_tensor_cast_once(upstream: Path, tmp_path: Path) -> None:
    bake(WAN21, FolderHub(upstream), tmp_path, twin=True)
    source = shards(upstream / WAN21.component("transformer").source.repo / "transformer")
    baked = load_file(tmp_path / "wan21_i2v_480p/transformer" / STEM)
    assert baked.keys() == source.keys()
    kept = {name for name, tensor in baked.items() if tensor.dtype == torch.float32}
    assert {"scale_shift_table", "blocks.2.scale_shift_table", "blocks.0.norm2.weight"} <= kept
    assert "blocks.0.attn1.to_q.weight" not in kept
    assert all(torch.equal(baked[name], source[name].to(baked[name].dtype)) for name in source)


def test_bake_keeps_the_video_models_tokenizer_ready_and_lists_it(
    upstream: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = json.loads(bake(WAN21, FolderHub(upstream), tmp_path, twin=True).read_bytes())
    assert (tmp_path / "shared/umt5_tokenizer" / READY).is_file()
    assert f"shared/umt5_tokenizer/{READY}" in {line["path"] for line in manifest["files"]}
    assert "not kept ready" not in caplog.text  # of a scheduler or an image processor nothing is to be kept


def test_bake_merges_each_experts_loras_in_fp32(upstream: Path, tmp_path: Path) -> None:
    bake(SVI, FolderHub(upstream), tmp_path, twin=True)
    name = "blocks.1.ffn.net.2.weight"
    for part, strength in (("transformer", 1.2), ("transformer_2", 1.0)):
        source = shards(upstream / SVI.component(part).source.repo / part)[name]
        svi, light = (load_file(upstream / lora.source.repo / lora.file) for lora in SVI.loras_of(SVI.component(part)))
        key = "blocks.1.ffn.2"
        delta_svi = svi[f"{key}.lora_B.default.weight"] @ svi[f"{key}.lora_A.default.weight"]
        up, down = (light[f"diffusion_model.{key}.{side}.weight"] for side in ("lora_up", "lora_down"))
        alpha = light[f"diffusion_model.{key}.alpha"].item()
        expected = (source + 1.0 * delta_svi + strength * (alpha / 4 * (up @ down))).bfloat16()
        baked = load_file(tmp_path / "wan22_i2v_svi" / part / STEM)[name]
        assert torch.equal(baked, expected)
        assert not torch.equal(baked, source.bfloat16())


def test_bake_of_lightning_merges_lightx2v_alone_and_shares_what_no_lora_changes(
    upstream: Path, tmp_path: Path
) -> None:
    bake(SVI, FolderHub(upstream), tmp_path, twin=True)
    hub = Watched(FolderHub(upstream))
    bake(LIGHTNING, hub, tmp_path, twin=True)
    name = "blocks.1.ffn.net.2.weight"
    for part in ("transformer", "transformer_2"):
        source = shards(upstream / LIGHTNING.component(part).source.repo / part)[name]
        (row,) = LIGHTNING.loras_of(LIGHTNING.component(part))
        light = load_file(upstream / row.source.repo / row.file)
        up, down = (light[f"diffusion_model.blocks.1.ffn.2.{side}.weight"] for side in ("lora_up", "lora_down"))
        alpha = light["diffusion_model.blocks.1.ffn.2.alpha"].item()
        baked = load_file(tmp_path / "wan22_i2v_lightning" / part / STEM)[name]
        assert torch.equal(baked, (source + 1.0 * (alpha / 4 * (up @ down))).bfloat16())
    assert not [path for path in hub.fetched if path.startswith(("vae", "text_encoder", "tokenizer"))]


def test_bake_changes_exactly_the_modules_that_the_loras_name(upstream: Path, tmp_path: Path) -> None:
    bake(SVI, FolderHub(upstream), tmp_path, twin=True)
    source = shards(upstream / SVI.component("transformer").source.repo / "transformer")
    baked = load_file(tmp_path / "wan22_i2v_svi/transformer" / STEM)
    changed = {name for name in source if not torch.equal(baked[name], source[name].to(baked[name].dtype))}
    assert len(changed) == 30  # 3 blocks of q, k, v, o twice, and two feed-forward layers
    assert all(name.endswith("weight") and name.startswith("blocks.") for name in changed)


def test_bake_writes_blocks_in_execution_order(upstream: Path, tmp_path: Path) -> None:
    bake(SVI, FolderHub(upstream), tmp_path, twin=True)
    data = (tmp_path / "wan22_i2v_svi/transformer" / STEM).read_bytes()
    names = list(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))
    blocks = [int(name.split(".")[1]) for name in names if name.startswith("blocks.")]
    assert blocks == sorted(blocks)
    assert (names[1], names[-1]) == ("patch_embedding.weight", "scale_shift_table")


def test_bake_manifest_lists_every_file_with_its_size_and_hash(upstream: Path, tmp_path: Path) -> None:
    manifest = json.loads(bake(SVI, FolderHub(upstream), tmp_path, twin=True).read_bytes())
    assert (manifest["format"], manifest["profile"], manifest["twin"]) == (1, "wan22_i2v_svi", True)
    listed = {line["path"] for line in manifest["files"]}
    present = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path for path in present - listed if not path.endswith("/component.json")} == {
        ".lock", "wan22_i2v_svi/manifest.json",
    }  # fmt: skip
    high = manifest["components"]["transformer"]
    assert [lora["strength"] for lora in high["recipe"]["loras"]] == [1.0, 1.2]
    assert high["loras_sha256"] == [
        load_lora(upstream / lora.source.repo / lora.file).sha256 for lora in SVI.loras if lora.expert == "high"
    ]
    assert set(high["commits"]) == {SVI.component("transformer").source.repo, *(lora.source.repo for lora in SVI.loras)}


def test_bake_again_fetches_and_writes_nothing(upstream: Path, tmp_path: Path) -> None:
    bake(SVI, FolderHub(upstream), tmp_path, twin=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    hub = Watched(FolderHub(upstream))
    bake(SVI, hub, tmp_path, twin=True)
    assert hub.fetched == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before


def test_bake_stores_shared_components_once(upstream: Path, tmp_path: Path) -> None:
    bake(WAN21, FolderHub(upstream), tmp_path, twin=True)
    hub = Watched(FolderHub(upstream))
    bake(SVI, hub, tmp_path, twin=True)
    assert not [path for path in hub.fetched if path.startswith(("text_encoder/", "vae/", "tokenizer/"))]
    assert len(list(tmp_path.rglob("model.safetensors"))) == 2  # the text encoder, and Wan2.1's image encoder


def test_bake_goes_on_after_a_cut(upstream: Path, tmp_path: Path) -> None:
    repo = SVI.component("transformer_2").source.repo
    hub = Watched(
        FolderHub(upstream), breaks_at=f"{repo}/transformer_2/diffusion_pytorch_model-00002-of-00002.safetensors"
    )
    with pytest.raises(BakeFailed, match="cut"):
        bake(SVI, hub, tmp_path, twin=True)
    with pytest.raises(WeightsMissing):
        locate(SVI, Settings(weights_dir=tmp_path))
    assert not (tmp_path / "wan22_i2v_svi/transformer_2").exists()
    again = Watched(FolderHub(upstream))
    bake(SVI, again, tmp_path, twin=True)
    assert [path for path in again.fetched if path.startswith("transformer/")] == []
    locate(SVI, Settings(weights_dir=tmp_path)).verify()
    assert not (tmp_path / ".staging").exists()


def test_bake_replaces_a_component_whose_source_changed(spoilt: Path, tmp_path: Path) -> None:
    root = tmp_path / "weights"
    bake(WAN21, FolderHub(spoilt), root, twin=True)
    bake(SVI, FolderHub(spoilt), root, twin=True)
    vae = spoilt / WAN21.component("vae").source.repo / "vae" / STEM
    change(vae, lambda tensors: tensors["decoder.conv_in.bias"].add_(1))
    bake(WAN21, FolderHub(spoilt), root, twin=True)
    locate(WAN21, Settings(weights_dir=root)).verify()
    # the other profile's manifest spoke of the old file: it is gone until its bake has looked again
    with pytest.raises(WeightsMissing):
        locate(SVI, Settings(weights_dir=root))
    bake(SVI, FolderHub(spoilt), root, twin=True)
    locate(SVI, Settings(weights_dir=root)).verify()


def test_bake_mends_a_component_that_lost_a_file(upstream: Path, tmp_path: Path) -> None:
    bake(SDXL, FolderHub(upstream), tmp_path, twin=True)
    (tmp_path / "sdxl/vae" / STEM).unlink()
    bake(SDXL, FolderHub(upstream), tmp_path, twin=True)
    locate(SDXL, Settings(weights_dir=tmp_path)).verify()


def test_bake_mends_a_component_that_is_damaged(upstream: Path, tmp_path: Path) -> None:
    bake(SDXL, FolderHub(upstream), tmp_path, twin=True)
    path = tmp_path / "sdxl/vae" / STEM
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    bake(SDXL, FolderHub(upstream), tmp_path, twin=True)
    locate(SDXL, Settings(weights_dir=tmp_path)).verify()


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}'])
def test_bake_replaces_a_manifest_that_cannot_be_read(upstream: Path, tmp_path: Path, text: str) -> None:
    manifest = bake(SDXL, FolderHub(upstream), tmp_path, twin=True)
    manifest.write_text(text)
    bake(SDXL, FolderHub(upstream), tmp_path, twin=True)
    locate(SDXL, Settings(weights_dir=tmp_path)).verify()


def test_two_bakes_at_once_leave_one_whole_tree(upstream: Path, tmp_path: Path) -> None:
    hubs = [Watched(FolderHub(upstream)) for _ in range(2)]
    threads = [threading.Thread(target=bake, args=(SDXL, hub, tmp_path), kwargs={"twin": True}) for hub in hubs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(bool(hub.fetched) for hub in hubs) == [False, True]
    locate(SDXL, Settings(weights_dir=tmp_path)).verify()


@pytest.mark.parametrize("twin", [True, False])
def test_bake_keeps_twins_and_real_weights_apart(upstream: Path, tmp_path: Path, twin: bool) -> None:
    manifest = bake(SDXL, FolderHub(upstream), tmp_path, twin=True)
    manifest.write_text(json.dumps({**json.loads(manifest.read_bytes()), "twin": not twin}))
    with pytest.raises(BakeFailed, match="real weights" if twin else "tiny twins"):
        bake(WAN21, FolderHub(upstream), tmp_path, twin=twin)


def test_bake_refuses_a_repository_of_another_model(upstream: Path, tmp_path: Path) -> None:
    """What a real bake would do with our tiny repositories: their shapes are not the published ones."""
    with pytest.raises(BakeFailed, match="text_encoder is not the model that this profile was written for"):
        bake(SDXL, FolderHub(upstream), tmp_path)


def baked_lora(profile: Profile, spoilt: Path, root: Path) -> None:
    bake(profile, FolderHub(spoilt), root / "weights", twin=True)


def with_lora(index: int, lora: Lora) -> Profile:
    return replace(SVI, loras=(*SVI.loras[:index], lora, *SVI.loras[index + 1 :]))


def test_bake_refuses_the_other_experts_lora(upstream: Path, tmp_path: Path) -> None:
    swapped = with_lora(0, replace(SVI.loras[1], expert="high"))
    with pytest.raises(WeightsCorrupt, match="for the low-noise expert, not the high-noise one"):
        baked_lora(swapped, upstream, tmp_path)


def test_bake_refuses_one_lora_under_two_names(spoilt: Path, tmp_path: Path) -> None:
    files = [spoilt / lora.source.repo / lora.file for lora in SVI.loras if lora.expert == "high"]
    shutil.copyfile(files[0], files[1])
    with pytest.raises(WeightsCorrupt, match="are the same file"):
        baked_lora(SVI, spoilt, tmp_path)


def test_bake_refuses_a_lora_that_the_model_has_no_place_for(spoilt: Path, tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("blocks.0.", "blocks.7.")] = tensors.pop(name)

    change(spoilt / SVI.loras[0].source.repo / SVI.loras[0].file, rename)
    with pytest.raises(WeightsCorrupt, match="have no parameter"):
        baked_lora(SVI, spoilt, tmp_path)


def test_bake_refuses_a_lora_of_another_hash_than_the_row_names(upstream: Path, tmp_path: Path) -> None:
    with pytest.raises(BakeFailed, match="is not the file that the profile names"):
        baked_lora(with_lora(0, replace(SVI.loras[0], sha256="0" * 64)), upstream, tmp_path)


def test_bake_accepts_a_lora_of_the_hash_that_the_row_names(upstream: Path, tmp_path: Path) -> None:
    known = load_lora(upstream / SVI.loras[0].source.repo / SVI.loras[0].file).sha256
    baked_lora(with_lora(0, replace(SVI.loras[0], sha256=known)), upstream, tmp_path)
    assert (tmp_path / "weights/wan22_i2v_svi/manifest.json").is_file()


def test_bake_refuses_a_lora_that_is_not_published(upstream: Path, tmp_path: Path) -> None:
    with pytest.raises(BakeFailed, match=r"has no version-2\.0/other_high\.safetensors"):
        baked_lora(with_lora(0, replace(SVI.loras[0], file="version-2.0/other_high.safetensors")), upstream, tmp_path)


def test_needed_files_are_the_configuration_and_the_weights_of_the_variant() -> None:
    names = ["config.json", "model.fp16.safetensors", "model.safetensors", "pytorch_model.bin", "README.md"]
    listing = [RemoteFile(f"text_encoder/{name}", 1) for name in names]
    component = SDXL.component("text_encoder")
    assert [file.name for file in needed_files(component, listing)] == ["config.json", "model.fp16.safetensors"]
    with pytest.raises(BakeFailed, match=r"stable-diffusion-xl-base-1\.0 has no safetensors weights in text_encoder"):
        needed_files(component, listing[2:])


def test_needed_folders_names_each_repository_once() -> None:
    folders = {source.repo: names for source, names in needed_folders([WAN21, SVI]).items()}
    assert folders["Wan-AI/Wan2.2-I2V-A14B-Diffusers"] == ["transformer", "transformer_2", "scheduler"]
    assert folders["vita-video-gen/svi-model"] == ["version-2.0"]
    assert len(folders) == 4


def test_bake_keeps_the_lora_files_when_asked_and_lists_them(upstream: Path, tmp_path: Path) -> None:
    manifest = json.loads(bake(SVI, FolderHub(upstream), tmp_path, twin=True, keep_loras=True).read_bytes())
    paths = [line["path"] for line in manifest["files"]]
    assert [path for path in paths if "/loras/" in path] == [f"wan22_i2v_svi/loras/{i}.safetensors" for i in range(4)]
    parts = locate(SVI, Settings(weights_dir=tmp_path)).parts()
    for lora in SVI.loras:
        assert parts.load_lora(lora).sha256 == load_lora(upstream / lora.source.repo / lora.file).sha256


def test_bake_keeps_no_lora_files_unless_asked(upstream: Path, tmp_path: Path) -> None:
    bake(SVI, FolderHub(upstream), tmp_path, twin=True)
    assert not locate(SVI, Settings(weights_dir=tmp_path)).parts().keeps_loras


def test_bake_again_fetches_no_lora_that_was_kept(upstream: Path, tmp_path: Path) -> None:
    first = bake(SVI, FolderHub(upstream), tmp_path, twin=True, keep_loras=True).read_bytes()
    hub = Watched(FolderHub(upstream))
    assert bake(SVI, hub, tmp_path, twin=True, keep_loras=True).read_bytes() == first
    assert hub.fetched == []
    (tmp_path / "wan22_i2v_svi/loras/2.safetensors").write_bytes(b"damaged")
    assert bake(SVI, hub, tmp_path, twin=True, keep_loras=True).read_bytes() == first
    locate(SVI, Settings(weights_dir=tmp_path)).verify()


def test_lora_files_of_an_older_bake_are_not_used(upstream: Path, tmp_path: Path) -> None:
    """They may be others than those that are merged now; the manifest does not speak of them."""
    bake(SVI, FolderHub(upstream), tmp_path, twin=True, keep_loras=True)
    bake(SVI, FolderHub(upstream), tmp_path, twin=True)
    assert not locate(SVI, Settings(weights_dir=tmp_path)).parts().keeps_loras


def test_bake_refuses_one_file_as_the_lora_of_both_experts(upstream: Path, tmp_path: Path) -> None:
    copy = tmp_path / "upstream"
    shutil.copytree(upstream, copy)
    high, low = (copy / lora.source.repo / lora.file for lora in SVI.loras[:2])
    save_file(load_file(high), high)  # without the line that says which expert it is for, as the real files are
    shutil.copy(high, low)
    with pytest.raises(BakeFailed, match="the same file"):
        bake(SVI, FolderHub(copy), tmp_path / "weights", twin=True)
