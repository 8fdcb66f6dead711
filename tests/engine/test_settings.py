"""The environment: every variable read, every bad, unknown or half-given one refused."""

import os
from pathlib import Path

import pytest

from engine.settings import CUTE_DIR, MODES, ROOT, Secret, Settings, keep_kernels
from schemas.errors import SettingsError
from schemas.input_schema import INPUT_SCHEMA

S3 = {
    "BUCKET_ENDPOINT_URL": "https://s3.example.com",
    "BUCKET_ACCESS_KEY_ID": "key-id",
    "BUCKET_SECRET_ACCESS_KEY": "very-secret",
}


def test_empty_environment_gives_the_defaults() -> None:
    settings = Settings.from_env({})
    assert settings.weights_dir is None
    assert settings.output_dir == ROOT / "output"
    assert settings.response_limit_bytes == 9_500_000
    assert not settings.has_bucket
    assert not settings.in_cloud


def test_relative_folders_start_at_the_worker_not_at_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert Settings.from_env({"WORKER_WEIGHTS_DIR": "weights/tiny"}).weights_dir == ROOT / "weights" / "tiny"
    assert Settings.from_env({"WORKER_WEIGHTS_DIR": "/models"}).weights_dir == Path("/models")


def test_blank_value_counts_as_unset() -> None:
    assert Settings.from_env({"WORKER_VRAM_GIB": "  "}).vram_gib is None


@pytest.mark.parametrize(("value", "most_gpx"), [("", 25.0), ("7.5", 7.5), ("0", None), ("0.0", None)])
def test_bound_of_work_has_a_default_and_zero_is_none(value: str, most_gpx: float | None) -> None:
    assert Settings.from_env({"WORKER_MAX_WORK": value}).max_work_gpx == most_gpx


@pytest.mark.parametrize(
    ("value", "modes"),
    [
        ("", ()),
        ("image", ("image",)),
        (" video, image,video", ("video", "image")),
        ("video:wan22_i2v_lightning,video", ("video:wan22_i2v_lightning", "video")),
    ],
)
def test_modes_to_warm_up_for_are_read_in_their_order(value: str, modes: tuple[str, ...]) -> None:
    assert Settings.from_env({"WORKER_WARM_UP": value}).warm_up == modes


def test_modes_of_the_settings_are_those_of_requests() -> None:
    assert tuple(INPUT_SCHEMA) == MODES


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("WORKER_VRAM_GIB", "lots", "WORKER_VRAM_GIB is 'lots', not a number of GiB"),
        ("WORKER_VRAM_GIB", "-1", "WORKER_VRAM_GIB is '-1', not a number of GiB"),
        ("WORKER_VRAM_GIB", "nan", "WORKER_VRAM_GIB is 'nan', not a number of GiB"),
        ("WORKER_MAX_WORK", "-1", "WORKER_MAX_WORK is '-1', not a number of gigapixels, or 0"),
        ("WORKER_FETCH_TIMEOUT_S", "0", "WORKER_FETCH_TIMEOUT_S is '0', not seconds"),
        ("WORKER_RESPONSE_LIMIT_BYTES", "1e6", "WORKER_RESPONSE_LIMIT_BYTES is '1e6', not a number of bytes"),
        ("WORKER_COMPILE", "maybe", "WORKER_COMPILE is 'maybe', not 1 or 0"),
        ("WORKER_WARM_UP", "image,film", "WORKER_WARM_UP is 'image,film', not modes (image, video, svi_endframe)"),
        ("WORKER_PRECISION", "fp4", "WORKER_PRECISION is 'fp4', not bf16, fp8 or int8"),
        ("WORKER_VRAM_GB", "44", "WORKER_VRAM_GB is not a setting; did you mean WORKER_VRAM_GIB?"),
        ("BUCKET_NAM", "b", "BUCKET_NAM is not a setting; did you mean BUCKET_NAME?"),
        ("BUCKET_NAME", "b", "S3 is half set"),
        ("WORKER_OUTPUT_DIR", "~no-such-person/x", "WORKER_OUTPUT_DIR is '~no-such-person/x', not a folder"),
        ("WORKER_FETCH_ALLOW", "10.0.0.0/99", "WORKER_FETCH_ALLOW is '10.0.0.0/99', not host names"),
    ],
)
def test_bad_variable_is_refused_with_a_sentence(variable: str, value: str, sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({variable: value})
    assert caught.value.sentence.startswith(sentence)


@pytest.mark.parametrize("missing", sorted(S3))
def test_half_set_s3_names_what_is_missing(missing: str) -> None:
    with pytest.raises(SettingsError, match=f"half set: {missing} missing"):
        Settings.from_env({name: value for name, value in S3.items() if name != missing})


def test_whole_s3_is_accepted() -> None:
    assert Settings.from_env(S3).has_bucket


def test_url_expiry_over_seven_days_is_refused() -> None:
    with pytest.raises(SettingsError, match="7 days"):
        Settings.from_env({**S3, "BUCKET_URL_EXPIRY_S": "604801"})


def test_secret_is_not_in_the_repr() -> None:
    settings = Settings.from_env(S3)
    assert "very-secret" not in repr(settings)
    assert "key-id" not in repr(settings)
    assert settings.bucket_secret_access_key == "very-secret"
    assert repr(Secret("x")) == "Secret('***')"


def test_bad_secret_is_not_echoed_in_another_variables_error() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({**S3, "BUCKET_URL_EXPIRY_S": "soon"})
    assert "very-secret" not in caught.value.sentence


def test_kernels_are_kept_where_their_libraries_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flash4 = ("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")
    for name in ("TRITON_CACHE_DIR", CUTE_DIR, *flash4):
        monkeypatch.setenv(name, "elsewhere")
    assert keep_kernels(tmp_path)
    assert os.environ["TRITON_CACHE_DIR"] == f"{tmp_path}/triton"
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] == f"{tmp_path}/flash4"
    assert os.environ[CUTE_DIR] == f"{tmp_path}/cute"


def test_kernels_are_left_where_they_are_if_the_folder_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    (tmp_path / "file").touch()
    assert not keep_kernels(tmp_path / "file" / "cache")
    monkeypatch.setattr(os, "access", lambda *_: False)  # a read-only file system, which only a mount could make
    assert not keep_kernels(tmp_path)
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"
