"""What keeps a worker from taking its first job, each with its one sentence."""

import json
import shutil
from pathlib import Path

import pytest

from engine.fitness import check_card, check_weights, checks
from engine.settings import Settings
from schemas.errors import CardUnfit, WeightsCorrupt, WeightsMissing


@pytest.fixture
def baked(twins: Path, tmp_path: Path) -> Path:
    """Weights that do not say they are twins."""
    root = tmp_path / "weights"
    shutil.copytree(twins, root)
    for path in root.glob("*/manifest.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "twin": False}))
    return root


def test_whole_weights_pass(baked: Path) -> None:
    check_weights(Settings(weights_dir=baked))


def test_worker_without_any_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match="searched WORKER_WEIGHTS_DIR"):
        check_weights(Settings(weights_dir=tmp_path))


def test_one_short_file_is_enough_to_refuse_the_worker(baked: Path) -> None:
    weights = next((baked / "sdxl" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(WeightsCorrupt, match="cut short"):
        check_weights(Settings(weights_dir=baked))


def test_one_profile_is_enough(baked: Path) -> None:
    shutil.rmtree(baked / "wan22_i2v_svi")
    shutil.rmtree(baked / "wan22_i2v_lightning")
    shutil.rmtree(baked / "wan21_i2v_480p")
    check_weights(Settings(weights_dir=baked))


def test_real_weights_need_a_card(baked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(CardUnfit, match="no CUDA card"):
        check_card(Settings(weights_dir=baked))


def test_twins_need_no_card(twins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_card(Settings(weights_dir=twins))


def test_small_card_is_refused_unless_the_operator_set_its_size(baked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        total_memory = 24 * 2**30

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: Card)
    with pytest.raises(CardUnfit, match=r"24\.0 GiB; 40 are needed"):
        check_card(Settings(weights_dir=baked))
    check_card(Settings(weights_dir=baked, vram_gib=23.0))


def test_checks_are_three_and_pass_on_twins_without_s3(twins: Path) -> None:
    found = checks(Settings(weights_dir=twins))
    assert len(found) == 3
    for check in found:
        check()
