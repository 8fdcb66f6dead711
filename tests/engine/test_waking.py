"""What is asked of a card beside the imports: in threads, once, and with nothing to say where there is no card."""

import ctypes
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import handler
import model_handler
from apps import standby
from bench.jobs import JOBS
from engine import waking
from engine.card import Levers
from engine.profiles import PROFILES, Profile
from engine.progress import Progress
from engine.settings import Settings
from model_handler import ModelHandler
from tests.engine.test_hidden import printed

SVI = PROFILES["wan22_i2v_svi"]

HANDLER = """
import threading
from pathlib import Path
from engine import waking, weights
from engine.profiles import PROFILES
from engine.settings import Settings

begun = []
waking._start_driver = lambda: begun.append("torch" in sys.modules)
baked = weights.locate(PROFILES["wan22_i2v_svi"], Settings(weights_dir=Path(sys.argv[1])))
for _ in range(2):
    baked.parts()
print(begun, "torch" in sys.modules)
"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is begun on a card that is not there."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(model_handler, "device", lambda: "cuda")
    monkeypatch.setattr(waking, "begin", lambda *of: calls.append(of))
    return calls


def test_driver_begins_before_torch_is_imported_and_once(twins: Path) -> None:
    assert printed(HANDLER, args=(str(twins),)).split() == ["[False]", "True"]


@pytest.mark.parametrize(("answer", "contexts"), [(0, 1), (100, 0)])
def test_context_is_made_where_there_is_a_card(answer: int, contexts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    driver = SimpleNamespace(cuInit=lambda _: answer, cuDevicePrimaryCtxRetain=lambda _, card: made.append(card))
    monkeypatch.setattr(ctypes, "CDLL", {waking.DRIVER: driver}.__getitem__)
    waking._start_driver()
    assert made == [0] * contexts


def test_machine_without_a_driver_has_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waking, "DRIVER", "libno_such_driver.so.1")
    waking._start_driver()


def test_first_load_of_a_process_is_begun_once_and_only_for_a_card(
    asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = ModelHandler(Settings(precision="fp8", attention="native"))
    monkeypatch.setattr(model_handler, "device", lambda: "cpu")
    models.wake(SVI)
    assert asked == []
    monkeypatch.setattr(model_handler, "device", lambda: "cuda")
    models.wake(SVI)
    models.wake(SVI)
    assert asked == [("fp8", "cuda", Levers("native", True, models._settings.cache_dir))]


@pytest.mark.parametrize(("baked_in", "precision"), [("fp8", "fp8"), (None, None)])
def test_precision_is_that_of_the_bake_where_nobody_asks(
    baked_in: str | None, precision: str | None, asked: list[tuple[Any, ...]]
) -> None:
    ModelHandler(Settings()).wake(SVI if baked_in is None else SVI.baked_in(baked_in))
    assert [of[0] for of in asked] == [precision]


def test_what_goes_wrong_in_the_thread_keeps_nothing_else_from_being_done(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def broken(*_: object) -> bool:
        done.append("broken")
        raise RuntimeError("no kernels here")

    monkeypatch.setattr(waking, "prove_first", broken)
    monkeypatch.setattr(waking, "_use", done.append)
    waking.begin("fp8", "cpu", Levers())
    for thread in threading.enumerate():
        if thread.name == "waking":
            thread.join()
    assert done == ["broken", "cpu"]


def test_what_a_card_computes_first_is_what_a_cpu_can_too() -> None:
    waking._use("cpu")


def test_job_wakes_the_card_before_it_imports_what_it_computes_with(
    twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story: list[str] = []

    def imports(profile: Profile) -> None:
        story.append(f"imports {profile.name}")
        raise ImportError

    monkeypatch.setattr(ModelHandler, "wake", lambda _, profile: story.append(f"wakes for {profile.name}"))
    monkeypatch.setattr(handler, "import_backend", imports)
    settings = Settings(weights_dir=twins, output_dir=tmp_path, outbox_dir=tmp_path / "outbox")
    job, worker = JOBS["svi_endframe"], handler.Worker(settings, ModelHandler(settings))
    with pytest.raises(ImportError):
        handler.run(job.whole(0, job.small), job_id="one", worker=worker, progress=Progress())
    assert [entry.split()[0] for entry in story] == ["wakes", "imports"]
    assert len({entry.split()[-1] for entry in story}) == 1


def test_worker_that_waits_tries_the_kernels_of_its_one_model(
    twins: Path, tmp_path: Path, asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("shared", "wan22_i2v_svi"):
        (tmp_path / name).symlink_to(twins / name)
    settings = Settings(weights_dir=tmp_path, precision="fp8")
    models = ModelHandler(settings)
    monkeypatch.setattr("engine.speed.prove_ahead", lambda *of: asked.append(("after", *of)))
    monkeypatch.setattr(standby, "import_backend", lambda _: None)
    standby.get_ready(settings, models)
    assert asked == [("fp8", "cuda", models._levers), ("after", "fp8", "cuda", models._levers)]


def test_nothing_is_tried_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.speed.prove_ahead", lambda *_: pytest.fail("there is no card"))
    ModelHandler(Settings(precision="fp8")).try_kernels(SVI)


@pytest.mark.gpu
def test_torch_uses_the_context_that_the_driver_was_asked_for() -> None:
    """In a new process: what torch asks of the card afterwards adds no second context, which would be 0.5 GB."""
    code = """
from engine import waking

waking.begin_driver()
[thread.join() for thread in __import__("threading").enumerate() if thread.name == "driver"]
import torch

before = torch.cuda.mem_get_info()[0]
torch.ones(1, device="cuda").sum().item()
print(before - torch.cuda.mem_get_info()[0] < 100 * 2**20)
"""
    assert printed(code).strip() == "True"
