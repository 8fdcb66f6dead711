"""Which of several bakes the worker takes: WORKER_PRECISION, what lies where, and what the log says of it."""

import logging
import shutil
from pathlib import Path

import pytest

from engine.bake import bake
from engine.fitness import check_weights
from engine.hub import FolderHub
from engine.profiles import PROFILES
from engine.settings import Settings
from engine.weights import Place, locate, recipe
from schemas.errors import SettingsError, WeightsMissing

SDXL, SVI = PROFILES["sdxl"], PROFILES["wan22_i2v_svi"]
FOLDERS = {"bf16": "wan22_i2v_svi", "fp8": "wan22_i2v_svi-fp8", "int8": "wan22_i2v_svi-int8"}


@pytest.fixture(scope="module")
def every(twins: Path, upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twins, and the SVI twin in 8 bits too. Read only."""
    root = Path(shutil.copytree(twins, tmp_path_factory.mktemp("every") / "weights"))
    for precision in ("fp8", "int8"):
        bake(SVI.baked_in(precision), FolderHub(upstream), root, twin=True)
    return root


def holding(every: Path, precisions: str, root: Path) -> Path:
    """A folder in which the SVI profile counts as baked in `precisions` only, with no bytes copied."""
    root.mkdir()
    for path in every.iterdir():
        if path.name not in FOLDERS.values():
            (root / path.name).symlink_to(path)
    (root / "wan22_i2v_svi").mkdir()
    (root / "wan22_i2v_svi/scheduler").symlink_to(every / "wan22_i2v_svi/scheduler")
    for precision in precisions.split():
        (root / FOLDERS[precision]).mkdir(exist_ok=True)
        for path in (every / FOLDERS[precision]).iterdir():
            if path.name != "scheduler":
                (root / FOLDERS[precision] / path.name).symlink_to(path)
    return root


@pytest.mark.parametrize(
    ("baked", "asked", "taken"),
    [
        ("bf16", None, "bf16"),
        ("fp8", None, "fp8"),
        ("int8", None, "int8"),
        ("bf16 fp8 int8", None, "bf16"),
        ("fp8 int8", None, "fp8"),
        ("bf16 fp8 int8", "bf16", "bf16"),
        ("bf16 fp8 int8", "fp8", "fp8"),
        ("bf16 fp8 int8", "int8", "int8"),
        ("bf16", "fp8", "bf16"),
        ("bf16 fp8", "int8", "bf16"),
    ],
)
def test_locate_takes_the_bake_of_the_precision_asked_for(
    every: Path, tmp_path: Path, baked: str, asked: str | None, taken: str
) -> None:
    root = holding(every, baked, tmp_path / "weights")
    found = locate(SVI, Settings(weights_dir=root, precision=asked))
    assert (found.profile.precision, found.profile.folder) == (taken, FOLDERS[taken])
    assert found.folders["transformer"] == root / FOLDERS[taken] / "transformer"


@pytest.mark.parametrize(("baked", "asked"), [("fp8", "bf16"), ("fp8", "int8"), ("int8", "fp8")])
def test_locate_refuses_to_make_8_bits_wider_or_other_ones(every: Path, tmp_path: Path, baked: str, asked: str) -> None:
    root = holding(every, baked, tmp_path / "weights")
    with pytest.raises(SettingsError) as caught:
        locate(SVI, Settings(weights_dir=root, precision=asked))
    assert caught.value.sentence == (
        f"wan22_i2v_svi is baked in {baked}, and WORKER_PRECISION asks for {asked}: "
        f"unset it, or bake with download_weights.py --precision {asked}"
    )


@pytest.mark.parametrize("asked", [None, "bf16", "fp8"])
def test_locate_says_that_nothing_is_there_whatever_is_asked_for(tmp_path: Path, asked: str | None) -> None:
    with pytest.raises(WeightsMissing, match="the weights of wan22_i2v_svi are not there"):
        locate(SVI, Settings(weights_dir=tmp_path, precision=asked))


def test_locate_prefers_the_precision_asked_for_to_the_nearer_place(every: Path, tmp_path: Path) -> None:
    near, far = holding(every, "bf16", tmp_path / "near"), holding(every, "fp8", tmp_path / "far")
    places = [Place("near", near), Place("far", far)]
    for folder in (near, far):
        _pass_for_real(folder)
    assert locate(SVI, Settings(precision="fp8"), places).place.name == "far"
    assert locate(SVI, Settings(), places[::-1]).place.name == "far"  # unset: what the first place holds


def _pass_for_real(root: Path) -> None:
    for path in root.glob("*/manifest.json"):
        text = path.read_text().replace('"twin": true', '"twin": false')
        path.unlink()
        path.write_text(text)


def test_locate_says_what_it_took_and_what_else_is_there(
    every: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    locate(SVI, Settings(weights_dir=every))
    locate(SVI, Settings(weights_dir=holding(every, "fp8", tmp_path / "weights")))
    assert [record.getMessage() for record in caplog.records] == [
        "wan22_i2v_svi: bf16 weights from WORKER_WEIGHTS_DIR; also baked: fp8, int8, see WORKER_PRECISION",
        "wan22_i2v_svi: fp8 weights from WORKER_WEIGHTS_DIR",
    ]


@pytest.mark.parametrize("asked", [None, "bf16", "fp8", "int8"])
def test_sdxl_has_one_bake_for_every_precision(every: Path, asked: str | None) -> None:
    assert locate(SDXL, Settings(weights_dir=every, precision=asked)).profile.precision == "fp16"


def test_recipe_of_another_precision_is_another_recipe() -> None:
    recipes = [recipe(row.component("transformer"), row) for row in map(SVI.baked_in, FOLDERS)]
    assert [each["dtype"] for each in recipes] == ["bf16", "fp8", "int8"]
    assert all({**each, "dtype": "bf16"} == recipes[0] for each in recipes)


def test_worker_with_another_precision_than_the_image_holds_does_not_start(every: Path, tmp_path: Path) -> None:
    root = holding(every, "fp8", tmp_path / "weights")
    check_weights(Settings(weights_dir=root))
    with pytest.raises(SettingsError, match="baked in fp8, and WORKER_PRECISION asks for bf16"):
        check_weights(Settings(weights_dir=root, precision="bf16"))
