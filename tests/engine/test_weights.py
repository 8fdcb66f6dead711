"""Finding weights: the order of places, what counts as whole, and that a twin is never taken for the real thing."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.profile import Profile
from engine.profiles import PROFILES
from engine.settings import ROOT, Settings
from engine.weights import PLACES, Place, locate
from schemas.errors import WeightsCorrupt, WeightsMissing

SDXL = PROFILES["sdxl"]
WAN21 = PROFILES["wan21_i2v_480p"]
SVI = PROFILES["wan_2_2_i2v_lightning_svi_3_3"]


def manifest_of(root: Path, folder: str = "sdxl") -> dict[str, Any]:
    return json.loads((root / folder / "manifest.json").read_bytes())


def change_manifest(root: Path, folder: str = "sdxl", **values: Any) -> None:
    (root / folder / "manifest.json").write_text(json.dumps({**manifest_of(root, folder), **values}))


@pytest.fixture
def twin(twins: Path, tmp_path: Path) -> Path:
    """A folder of twins that a test may spoil."""
    return Path(shutil.copytree(twins, tmp_path / "twin"))


@pytest.fixture
def real(twin: Path, tmp_path: Path) -> Path:
    """The same, passing for real weights."""
    root = Path(shutil.copytree(twin, tmp_path / "real"))
    for path in root.glob("*/manifest.json"):
        change_manifest(root, path.parent.name, twin=False)
    return root


def cached(upstream: Path, root: Path, profile: Profile) -> Path:
    """The profile's repositories as a Hugging Face cache keeps them."""
    for repo in {part.source.repo for part in profile.components}:
        folder = root / f"models--{repo.replace('/', '--')}"
        shutil.copytree(upstream / repo, folder / "snapshots" / "abc123")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc123\n")
    return root


def places(**roots: Path) -> list[Place]:
    return [Place(name, path, "hub" if name == "cached" else "baked") for name, path in roots.items()]


def test_locate_takes_the_first_place_that_holds_the_profile(real: Path, upstream: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    hub = cached(upstream, tmp_path / "cache", SDXL)
    table = [
        (places(image=real, cached=hub, volume=real), "image"),
        (places(image=empty, cached=hub, volume=real), "cached"),
        (places(image=empty, cached=empty, volume=real), "volume"),
    ]
    for order, name in table:
        assert locate(SDXL, Settings(), order).place.name == name


def test_locate_searches_the_image_the_cached_model_and_the_volume_in_this_order() -> None:
    assert [(place.path, place.layout) for place in PLACES] == [
        (ROOT / "weights" / "baked", "baked"),
        (Path("/runpod-volume/huggingface-cache/hub"), "hub"),
        (Path("/runpod-volume/weights"), "baked"),
    ]


def test_locate_looks_nowhere_else_when_the_setting_names_a_folder(real: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match="searched WORKER_WEIGHTS_DIR"):
        locate(SDXL, Settings(weights_dir=tmp_path / "empty"), places(image=real))


def test_locate_names_every_place_it_searched(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing) as caught:
        locate(SDXL, Settings(), places(image=tmp_path / "a", cached=tmp_path / "b", volume=tmp_path / "c"))
    assert caught.value.sentence == (
        "the weights of sdxl are not there; searched image, cached, volume. "
        "Bake them with download_weights.py --profiles sdxl, or set WORKER_WEIGHTS_DIR"
    )


def test_locate_never_takes_a_twin_that_nobody_pointed_at(twin: Path, real: Path) -> None:
    with pytest.raises(WeightsMissing):
        locate(SDXL, Settings(), places(image=twin))
    assert locate(SDXL, Settings(), places(image=twin, volume=real)).place.name == "volume"


def test_locate_renames_a_twin_and_lets_it_take_small_sizes(twin: Path) -> None:
    profile = locate(SVI, Settings(weights_dir=twin)).profile
    assert profile.name == "tiny/wan_2_2_i2v_lightning_svi_3_3"
    assert (profile.is_twin, profile.min_side, profile.max_area) == (True, 32, 9216)
    assert (profile.height * profile.width <= 9216, profile.folder) == (True, "wan22_i2v_svi")


def test_locate_leaves_the_real_profile_as_it_is(real: Path) -> None:
    assert locate(SVI, Settings(), places(image=real)).profile is SVI


@pytest.mark.parametrize("place", ["sdxl/unet/diffusion_pytorch_model.safetensors", "sdxl/tokenizer/vocab.json"])
@pytest.mark.parametrize("fault", ["missing", "short", "long"])
def test_locate_refuses_a_file_of_another_size(twin: Path, place: str, fault: str) -> None:
    data = (twin / place).read_bytes()
    (twin / place).unlink()
    if fault != "missing":
        (twin / place).write_bytes(data[:-1] if fault == "short" else data + b"\0")
    with pytest.raises(WeightsCorrupt, match=f"{place} of sdxl is missing or cut short"):
        locate(SDXL, Settings(weights_dir=twin))


def test_locate_refuses_shared_files_that_are_gone(twin: Path) -> None:
    shutil.rmtree(twin / "shared" / "wan_vae")
    with pytest.raises(WeightsCorrupt, match=r"shared/wan_vae/config\.json"):
        locate(WAN21, Settings(weights_dir=twin))


def test_locate_refuses_other_lora_strengths_than_the_row_names(twin: Path) -> None:
    components = manifest_of(twin, "wan22_i2v_svi")["components"]
    components["transformer"]["recipe"]["loras"][1]["strength"] = 0.5
    change_manifest(twin, "wan22_i2v_svi", components=components)
    with pytest.raises(WeightsCorrupt, match="transformer of wan22_i2v_svi was baked to another recipe"):
        locate(SVI, Settings(weights_dir=twin))


def test_locate_refuses_a_manifest_of_another_format(twin: Path) -> None:
    change_manifest(twin, format=2)
    with pytest.raises(WeightsCorrupt, match="format 2, this worker reads 1"):
        locate(SDXL, Settings(weights_dir=twin))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_locate_refuses_what_is_no_manifest(twin: Path, text: str) -> None:
    (twin / "sdxl" / "manifest.json").write_text(text)
    with pytest.raises(WeightsCorrupt, match="manifest of sdxl cannot be read"):
        locate(SDXL, Settings(weights_dir=twin))


@pytest.mark.parametrize("lost", ["components", "files", "twin"])
def test_locate_refuses_a_manifest_that_lacks_a_part(twin: Path, lost: str) -> None:
    manifest = manifest_of(twin)
    del manifest[lost]
    (twin / "sdxl" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WeightsCorrupt, match="manifest of sdxl cannot be read; bake it again"):
        locate(SDXL, Settings(weights_dir=twin))


def test_locate_skips_a_cached_model_that_is_not_whole(real: Path, upstream: Path, tmp_path: Path) -> None:
    hub = cached(upstream, tmp_path / "cache", SDXL)
    shutil.rmtree(hub / "models--madebyollin--sdxl-vae-fp16-fix" / "snapshots")
    assert locate(SDXL, Settings(), places(cached=hub, volume=real)).place.name == "volume"


def test_locate_skips_the_cached_model_of_a_profile_with_loras(upstream: Path, tmp_path: Path) -> None:
    hub = cached(upstream, tmp_path / "cache", SVI)
    with pytest.raises(WeightsMissing):
        locate(SVI, Settings(), places(cached=hub))


def test_cached_model_loads_what_the_bake_would_have_written(twins: Path, upstream: Path, tmp_path: Path) -> None:
    import torch

    hub = cached(upstream, tmp_path / "cache", WAN21)
    published = locate(WAN21, Settings(), places(cached=hub)).parts()
    baked = locate(WAN21, Settings(weights_dir=twins)).parts()
    for name in ("transformer", "text_encoder", "image_encoder", "vae"):
        ours, theirs = baked.load(name).state_dict(), published.load(name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in ours)


def test_verify_accepts_what_the_bake_wrote(twins: Path) -> None:
    locate(SVI, Settings(weights_dir=twins)).verify()


def test_verify_finds_one_flipped_bit_anywhere(twin: Path) -> None:
    """Twenty places, drawn by size: the libraries load all of these files without a word."""
    baked = locate(SDXL, Settings(weights_dir=twin))
    draw = random.Random(0)
    for file in draw.choices(baked.files, weights=[file.size_bytes for file in baked.files], k=20):
        path = twin / file.path
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        good = path.read_bytes()
        path.write_bytes(data)
        with pytest.raises(WeightsCorrupt, match=f"{file.path} of tiny/sdxl is damaged"):
            baked.verify()
        path.write_bytes(good)
    baked.verify()


def test_verify_finds_a_hole_and_a_swapped_file_of_the_same_size(twin: Path) -> None:
    baked = locate(SVI, Settings(weights_dir=twin))
    high, low = (
        twin / f"wan22_i2v_svi/{name}/diffusion_pytorch_model.safetensors" for name in ("transformer", "transformer_2")
    )
    good = high.read_bytes()
    for spoiled in (good[: len(good) // 2].ljust(len(good), b"\0"), low.read_bytes()):
        high.write_bytes(spoiled)
        assert locate(SVI, Settings(weights_dir=twin)).files == baked.files  # sizes alone say nothing
        with pytest.raises(WeightsCorrupt, match="wan22_i2v_svi/transformer/"):
            baked.verify()


def test_verify_finds_a_file_that_vanished(twin: Path) -> None:
    baked = locate(SDXL, Settings(weights_dir=twin))
    (twin / "sdxl/vae/config.json").unlink()
    with pytest.raises(WeightsCorrupt, match=r"config\.json cannot be read"):
        baked.verify()
