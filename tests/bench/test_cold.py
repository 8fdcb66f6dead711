"""The cold-start bench at a twin's size: the files are a bake's, and the fields are there."""

import importlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from apps import standby
from bench import cold
from bench.random_bake import write_bake
from engine.profiles import PROFILES
from engine.progress import Progress
from engine.readahead import ReadAhead
from engine.settings import Settings
from engine.weights import locate
from model_handler import ModelHandler
from tests.engine.disk import readers

SVI = PROFILES["wan22_i2v_svi"]


@pytest.fixture(scope="module")
def weights(twins: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    write_bake(SVI.baked_in("fp8"), root, twins, is_small=True)
    return root


@pytest.fixture
def args(weights: Path, twins: Path, tmp_path: Path) -> Namespace:
    return Namespace(
        weights=weights, twins=twins, precision="fp8", cap_gib=44.5, cache_dir=tmp_path / "graphs", repeats=1,
        small=True, before=None, started=0.0, json=tmp_path / "cold.json", only=None,
        processes=1,
    )  # fmt: skip


def data_bytes(root: Path) -> int:
    """Of the tensors of all files."""
    heads = [(path.stat().st_size, path.open("rb").read(8)) for path in root.rglob("*.safetensors")]
    return sum(size - 8 - int.from_bytes(head, "little") for size, head in heads)


def test_random_bake_is_found_and_loaded_as_a_bake(weights: Path) -> None:
    baked = locate(SVI, Settings(weights_dir=weights, precision="fp8"))
    model = baked.parts().load("transformer")
    block = model.blocks[0]
    assert block.attn1.to_q.weight_q.dtype == torch.float8_e4m3fn
    assert (block.attn1.to_q.weight_q.float() * block.attn1.to_q.weight_scale[:, None]).std().item() == pytest.approx(
        0.02, rel=0.1
    )
    assert block.norm2.weight.unique().tolist() == [1.0]
    assert block.attn1.to_q.bias.unique().tolist() == [0.0]


def test_random_bake_makes_the_film_that_drawn_parts_make(weights: Path) -> None:
    """Else a cold job would wait for x264 at work on noise."""
    vae = locate(SVI, Settings(weights_dir=weights, precision="fp8")).parts().load("vae")
    drawn = {name: tensor for name, tensor in vae.state_dict().items() if tensor.numel() > 300}
    smaller = drawn.pop("decoder.conv_out.weight").std().item()
    assert smaller == pytest.approx(0.0025, rel=0.2)  # of 324 numbers
    assert [name for name, tensor in drawn.items() if tensor.std().item() != pytest.approx(0.02, rel=0.2)] == []


def test_random_bake_is_written_once(weights: Path, twins: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in weights.rglob("*.safetensors")}
    files = write_bake(SVI.baked_in("fp8"), weights, twins, is_small=True)
    assert {path: path.stat().st_mtime_ns for path in weights.rglob("*.safetensors")} == before
    assert [path.parent.name for path in files] == ["umt5_xxl-fp8", "wan_vae", "transformer", "transformer_2"]


def test_random_bake_of_another_film_is_written_anew(weights: Path, twins: Path) -> None:
    profile = SVI.baked_in("fp8")
    manifest = weights / profile.folder / "manifest.json"
    kept = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**kept, "film_deviation": 0.02}))
    write_bake(profile, weights, twins, is_small=True)
    assert json.loads(manifest.read_text()) == kept


def test_reading_alone_reads_every_byte_once(args: Namespace) -> None:
    assert cold._read(args)["bytes"] == data_bytes(args.weights)
    assert readers() == []


def test_jobs_load_once_and_tell_their_parts(args: Namespace) -> None:
    told = cold._jobs(args)
    assert told["loads"] == 1
    assert len(told["warm_s"]) == 1
    assert {"load", "denoise", "decode", "upload"} <= set(told["timings_s"])
    assert ("load_read" in told["timings_s"], "load_read" in told["warm_timings_s"]) == (True, False)
    assert json.loads(json.dumps(told)) == told


def test_warmed_up_worker_has_loaded_before_its_first_job(args: Namespace) -> None:
    args.before = "warm-up"
    told = cold._jobs(args)
    assert told["loads"] == 1
    assert "load_read" not in told["timings_s"]


def test_worker_that_waits_has_its_files_read_to_the_end_and_loads_nothing(
    args: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = list[str]()

    def get_ready(_: Settings, __: ModelHandler) -> None:
        story.append("ready")
        monkeypatch.setattr(ReadAhead, "last", ReadAhead([]))

    monkeypatch.setattr(standby, "get_ready", get_ready)
    monkeypatch.setattr(ReadAhead, "join", lambda _: story.append("join"))
    monkeypatch.setattr(cold, "_progress", lambda: story.append("job") or Progress())
    args.before = "standby"
    told = cold._jobs(args)
    assert story[:3] == ["ready", "join", "job"]
    assert told["loads"] == 1
    assert "load_read" in told["timings_s"]


@pytest.mark.parametrize("keeps", [False, True], ids=["not kept", "kept"])
def test_modules_that_came_without_bytecode_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    (tmp_path / "written_today.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", not keeps)
    monkeypatch.delitem(sys.modules, "written_today", raising=False)
    importlib.import_module("written_today")
    (cached,) = [path for path in cold._bytecode() if path.parent.parent == tmp_path]
    assert cached.exists() == keeps
    assert cold._written_since([cached], begun=0.0) == [cached]


def test_modules_that_had_bytecode_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "old.pyc").touch()
    os.utime(tmp_path / "old.pyc", (1000.0, 1000.0))
    assert cold._written_since([tmp_path / "old.pyc"], begun=1000.5) == []


def test_drop_leaves_nothing_of_a_file_in_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(1000))
    advised: list[tuple[int, int, int]] = []
    calls: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *advice: (calls.append("drop"), advised.append(advice)))
    cold.drop([path])
    assert (calls, advised) == (["fsync", "drop"], [(0, 0, os.POSIX_FADV_DONTNEED)])


def test_dd_reads_the_files_and_fails_with_them(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(1000))
    assert cold.dd([tmp_path / "x"]) > 0
    with pytest.raises(Exception, match="dd"):
        cold.dd([tmp_path / "nobody"])


def test_table_sets_the_figures_against_each_other() -> None:
    job: dict[str, Any] = {
        "first_s": 15.0, "warm_s": [9.0, 10.0, 14.0], "since_start_s": 16.0, "timings_s": {"load": 5.0}, "modules": 9,
        "without_bytecode": 2,
    }  # fmt: skip
    result = {
        "bytes": 36_000_000_000, "disk": {"dd_s": 12.0, "bytes": 36_000_000_000, "read_s": 15.0, "card_s": 0.7},
        "cold_cache_in_memory": [{**job, "first_s": 14.0}], "cold_cache": [job],
        "warm_cache": [{**job, "first_s": 12.0}],
        "restarted": [
            {**job, "first_s": 13.5, "since_start_s": 19.0}, {**job, "first_s": 10.5, "warm_s": [10.0]},
            {**job, "first_s": 11.0, "timings_s": {"load": 4.0}},
        ],
    }  # fmt: skip
    assert cold.table(result).splitlines() == [
        "weights                 36.00 GB",
        "dd                      3.00 GB/s",
        "ours, to where it works 2.40 GB/s, 80 % of dd; bus busy 0.70 s",
        "first job, cold compile cache, files in memory: 14.00 s (14.00-14.00, n = 1), 1.40 times a warm one "
        "(10.00 s); 16.00 s after the process was started",
        "  of the last load 5.00; 2 of 9 modules had no bytecode",
        "first job, cold compile cache: 15.00 s (15.00-15.00, n = 1), 1.50 times a warm one (10.00 s); "
        "16.00 s after the process was started",
        "  of the last load 5.00; 2 of 9 modules had no bytecode",
        "first job, warm compile cache: 12.00 s (12.00-12.00, n = 1), 1.20 times a warm one (10.00 s); "
        "16.00 s after the process was started",
        "  of the last load 5.00; 2 of 9 modules had no bytecode",
        "first job, the same, files in memory: 11.00 s (10.50-13.50, n = 3), 1.10 times a warm one (10.00 s); "
        "16.00 s after the process was started",
        "  of the last load 4.00; 2 of 9 modules had no bytecode",
    ]


def test_every_process_finds_compiled_kernels_only_where_it_is_told(
    args: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a first job after any other one would pass for cold, and be warm."""
    environments: list[dict[str, str]] = []

    def run(*_: object, env: dict[str, str], **__: object) -> subprocess.CompletedProcess[str]:
        environments.append(env)
        return subprocess.CompletedProcess([], 0, "{}\n")

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        cold._child(args, "jobs", tmp_path)
    folders = [Path(env[f"{name}_CACHE_DIR"]) for env in environments for name in ("TORCHINDUCTOR", "TRITON")]
    assert len(set(folders)) == 4
    assert [list(folder.iterdir()) for folder in folders] == [[]] * 4


def test_figure_that_cannot_be_had_leaves_the_others(
    args: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").write_bytes(bytes(1000))
    asked: list[tuple[str, ...]] = []
    job: dict[str, Any] = {
        "first_s": 1.0, "warm_s": [1.0], "since_start_s": 2.0, "timings_s": {}, "modules": 9, "without_bytecode": 0
    }  # fmt: skip
    jobs = iter([subprocess.CalledProcessError(1, "jobs"), *({**job, "first_s": 1.0 - 0.1 * i} for i in range(5))])
    found: list[Path] = []

    def child(_: Namespace, what: str, scratch: Path, *more: str) -> dict[str, Any]:
        asked.append((what, *more))
        found.append(args.cache_dir)
        read = {"bytes": 1000, "read_s": 1.0, "card_s": 0.0}
        answer: Any = {"bake": {"files": [str(tmp_path / "x")]}, "read": read}.get(what) or next(jobs)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(cold, "_child", child)
    monkeypatch.setattr(cold, "drop", lambda _: asked.append(("drop",)))
    assert cold._measure_all(args, tmp_path) == 1
    kept = json.loads(args.json.read_text())
    assert (list(kept), kept["cold_cache"]) == (
        ["bytes", "cold_cache", "warm_cache", "restarted", "waited", "warmed_up", "disk"],
        [job],
    )
    drop, jobs_ = ("drop",), ("jobs",)
    assert asked == [
        ("bake",), jobs_, drop, jobs_, drop, jobs_, jobs_, drop, ("jobs", "--before", "standby"), drop,
        ("jobs", "--before", "warm-up"), drop, drop, ("read",)
    ]  # fmt: skip
    given, in_memory, cold_cache, *after, _ = found
    assert len({given, in_memory, cold_cache}) == 3, "each start with an empty cache has a folder of its own"
    assert {*after} == {cold_cache}, "and what comes after it finds what it left"
    said = capsys.readouterr()
    assert "cold_cache_in_memory: Command 'jobs' returned" in said.err
    assert "first job, cold compile cache: 1.00 s" in said.out and "files in memory: 1.00 s" not in said.out


def test_only_the_figures_that_are_asked_for_are_measured(
    args: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(bytes(1000))
    asked: list[str] = []

    def child(_: Namespace, what: str, *__: object) -> dict[str, Any]:
        asked.append(what)
        return {"files": [str(tmp_path / "x")]} if what == "bake" else {"bytes": 9, "read_s": 1.0, "card_s": 0.0}

    monkeypatch.setattr(cold, "_child", child)
    args.only = ["disk"]
    assert cold._measure_all(args, tmp_path) == 0
    assert asked == ["bake", "read"]
    assert list(json.loads(args.json.read_text())) == ["bytes", "disk"]


def test_every_process_of_a_figure_finds_what_the_figure_says(
    args: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the second process would find the graphs, or the files, of the first."""
    (tmp_path / "x").write_bytes(bytes(1000))
    found: list[Path] = []
    dropped: list[object] = []

    def child(_: Namespace, what: str, *__: object) -> dict[str, Any]:
        if what == "bake":
            return {"files": [str(tmp_path / "x")]}
        found.append(args.cache_dir)
        return {
            "first_s": float(len(found)), "warm_s": [1.0], "since_start_s": 2.0, "timings_s": {}, "modules": 9,
            "without_bytecode": 0,
        }  # fmt: skip

    monkeypatch.setattr(cold, "_child", child)
    monkeypatch.setattr(cold, "drop", dropped.append)
    args.only, args.processes = ["cold_cache"], 3
    assert cold._measure_all(args, tmp_path) == 0
    assert (len(set(found)), len(dropped)) == (3, 3)
    assert [job["first_s"] for job in json.loads(args.json.read_text())["cold_cache"]] == [1.0, 2.0, 3.0]
    assert capsys.readouterr().err.count("cold compile cache: {") == 3
