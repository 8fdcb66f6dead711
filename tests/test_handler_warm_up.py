"""A worker's own first request: it takes the path of a caller's, and leaves the loaded model and nothing else."""

from pathlib import Path
from typing import Any

import pytest

from engine.backends.wan_svi import WanSvi
from engine.settings import Secret, Settings
from handler import Worker, warm_up
from model_handler import ModelHandler
from schemas.errors import RequestTooLarge
from tests.test_handler import IMAGE, SVI, VIDEO


@pytest.fixture
def settings(twins: Path, tmp_path: Path) -> Settings:
    """Of a worker on the platform, with no way out for a file: no bucket answers, nothing else can be written."""
    (tmp_path / "no_folder").touch()
    return Settings(
        weights_dir=twins,
        output_dir=tmp_path / "no_folder" / "output",
        outbox_dir=tmp_path / "outbox",
        response_limit_bytes=1,
        deadline_s=0.001,
        bucket_endpoint_url="https://127.0.0.1:9/bucket",
        bucket_access_key_id=Secret("key"),
        bucket_secret_access_key=Secret("secret"),
        bucket_retry_s=0.01,
        in_cloud=True,
    )


@pytest.mark.parametrize("payload", [{**IMAGE, "mode": "image"}, VIDEO], ids=["image", "video"])
def test_warm_up_leaves_the_model_and_no_file(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: dict[str, Any]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    worker = Worker(settings, ModelHandler(settings))
    warm_up(payload, worker)
    assert worker.models.loads == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() or path.name.startswith("job-")] == [
        "no_folder"
    ]


def test_warm_up_ends_when_nothing_works_behind_its_job(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story: list[str] = []
    generate, finish = WanSvi.generate, WanSvi.finish
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(WanSvi, "generate", lambda *args: story.append("job") or generate(*args))
    monkeypatch.setattr(WanSvi, "finish", lambda backend: story.append("finish") or finish(backend))
    warm_up(SVI, Worker(settings, ModelHandler(settings)))
    assert story == ["job", "finish"]


def test_warm_up_that_the_operators_bound_refuses_names_the_bound(twins: Path) -> None:
    settings = Settings(weights_dir=twins, max_work_gpx=0.0001)
    with pytest.raises(RequestTooLarge, match="WORKER_MAX_WORK"):
        warm_up(VIDEO, Worker(settings, ModelHandler(settings)))
