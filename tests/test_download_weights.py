"""The command line: twins offline, the real bake against a hub on loopback, the budget, the lock."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import download_weights
from download_weights import main
from engine import profiles
from engine.profile import Profile
from engine.profiles import PROFILES
from engine.settings import ROOT, Settings
from engine.twins import twin_values, write_upstream
from engine.weights import locate
from tests.servers.hub_server import COMMIT, HubServer

SDXL = PROFILES["sdxl"]


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    write_upstream(SDXL, root)
    return root


@pytest.fixture
def server(upstream: Path, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(Path(shutil.copytree(upstream, tmp_path / "hub"))) as server:
        yield server


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published models are tiny for this test: the hub's files are the real thing, and no twins."""
    monkeypatch.setattr("engine.published.published_values", twin_values)


def test_tiny_bakes_and_verifies_every_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tiny", "--output", str(tmp_path)]) == 0
    assert main(["--verify", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:] == [
        "tiny/sdxl, fp16: 20 files are whole",
        "tiny/wan21_i2v_480p, bf16: 14 files are whole",
        "tiny/wan22_i2v_svi, bf16: 17 files are whole",
        "tiny/wan22_i2v_lightning, bf16: 15 files are whole",
    ]


def test_verify_looks_at_the_precision_that_it_is_asked_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--profiles", "wan22_i2v_svi", "--output", str(tmp_path), "--precision"]
    assert main(["--tiny", *common, "fp8"]) == 0
    assert main(["--verify", *common, "fp8"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "tiny/wan22_i2v_svi, fp8: 17 files are whole"
    assert main(["--verify", *common, "bf16"]) == 1
    assert "the weights of wan22_i2v_svi are not there" in capsys.readouterr().err
    path = tmp_path / "shared/umt5_xxl-fp8/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert main(["--verify", *common, "fp8"]) == 1
    assert "shared/umt5_xxl-fp8/model.safetensors of tiny/wan22_i2v_svi is damaged" in capsys.readouterr().err


def test_verify_fails_for_a_flipped_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--tiny", "--profiles", "sdxl", "--output", str(tmp_path)])
    path = tmp_path / "sdxl/tokenizer/merges.txt"
    path.write_bytes(path.read_bytes()[:-2] + b"x\n")
    assert main(["--verify", "--profiles", "sdxl", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith(
        "download_weights: sdxl/tokenizer/merges.txt of tiny/sdxl is damaged; bake it again\n"
    )


def test_full_disk_is_said_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    command = ["--tiny", "--profiles", "sdxl", "--output", str(tmp_path)]
    with monkeypatch.context() as disk:
        disk.setattr("engine.tensorfile.TensorWriter.write", full)
        assert main(command) == 1
    assert "download_weights: [Errno 28] No space left on device; what is finished stays" in capsys.readouterr().err
    assert main(command) == 0
    assert main(["--verify", "--profiles", "sdxl", "--output", str(tmp_path)]) == 0


def test_verify_fails_where_nothing_was_baked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--verify", "--profiles", "sdxl", "--output", str(tmp_path)]) == 1
    assert "the weights of sdxl are not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "precision", "status", "lines"),
    [
        ("sdxl", "bf16", 0, ["sdxl 11.5 GB, fp16", "together 11.5 GB, within the 70 GB budget"]),
        (
            "sdxl,wan21_i2v_480p",
            "bf16",
            0,
            ["sdxl 11.5 GB, fp16", "wan21_i2v_480p 47.2 GB, bf16", "together 58.7 GB, within the 70 GB budget"],
        ),
        (
            "wan21_i2v_480p,wan22_i2v_svi",
            "bf16",
            1,
            [
                "wan21_i2v_480p 47.2 GB, bf16",
                "wan22_i2v_svi 69.1 GB, bf16",
                "together 104.5 GB, OVER the 70 GB budget",
            ],
        ),
        ("wan22_i2v_svi", "fp8", 0, ["wan22_i2v_svi-fp8 36.4 GB, fp8", "together 36.4 GB, within the 70 GB budget"]),
        (
            "sdxl,wan21_i2v_480p,wan22_i2v_svi",
            "int8",
            0,
            [
                "sdxl 11.5 GB, fp16",
                "wan21_i2v_480p-int8 26.5 GB, int8",
                "wan22_i2v_svi-int8 36.4 GB, int8",
                "together 67.1 GB, within the 70 GB budget",
            ],
        ),
    ],
)
def test_dry_run_counts_shared_components_once_and_at_their_precision(
    names: str, precision: str, status: int, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dry-run", "--profiles", names, "--precision", precision]) == status
    assert [re.sub(r" +", " ", line) for line in capsys.readouterr().out.splitlines()] == lines


def test_bake_over_the_budget_fetches_nothing(server: HubServer, tmp_path: Path) -> None:
    names = "wan21_i2v_480p,wan22_i2v_svi"
    assert main(["--profiles", names, "--endpoint", server.url, "--output", str(tmp_path / "weights")]) == 1
    assert server.calls == []
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("names", ["sdlx", "sdxl,wan21", "wan_2_2_i2v_lightning_svi_3_3", ""])
def test_unknown_profiles_are_refused_with_the_list(names: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--dry-run", "--profiles", names])
    assert caught.value.code == 2
    assert "there are sdxl, wan21_i2v_480p, wan22_i2v_svi, wan22_i2v_lightning" in capsys.readouterr().err


def test_unknown_precision_is_refused_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--dry-run", "--precision", "fp16"])
    assert caught.value.code == 2
    assert "choose from" in capsys.readouterr().err


def test_bake_from_a_hub_end_to_end(server: HubServer, small: None, tmp_path: Path) -> None:
    output, lock = tmp_path / "weights", tmp_path / "weights.lock.json"
    arguments = ["--profiles", "sdxl", "--endpoint", server.url, "--output", str(output), "--lock-file", str(lock)]
    assert main(arguments) == 0
    baked = locate(SDXL, Settings(weights_dir=output))
    baked.verify()
    assert baked.profile.name == "sdxl"
    manifest = json.loads((output / "sdxl/manifest.json").read_bytes())
    assert {commit for part in manifest["components"].values() for commit in part["commits"].values()} == {COMMIT}
    assert not any(
        path.startswith("stabilityai/stable-diffusion-xl-base-1.0/text_encoder/model.saf") for path, _, _ in server.sent
    )
    server.sent.clear()
    assert main(arguments) == 0
    assert server.sent == []


def test_bake_says_in_one_sentence_what_a_hub_refused(
    server: HubServer, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults.status = {"madebyollin/sdxl-vae-fp16-fix": (403, "GatedRepo")}
    arguments = ["--profiles", "sdxl", "--endpoint", server.url, "--lock-file", str(tmp_path / "none.json")]
    assert main([*arguments, "--output", str(tmp_path / "weights")]) == 1
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("download_weights: madebyollin/sdxl-vae-fp16-fix is gated")
    assert not (tmp_path / "weights/sdxl/manifest.json").exists()


def test_lock_pins_what_the_next_bake_fetches(server: HubServer, small: None, tmp_path: Path) -> None:
    lock = tmp_path / "weights.lock.json"
    common = ["--profiles", "sdxl", "--endpoint", server.url, "--lock-file", str(lock)]
    assert main([*common, "--lock"]) == 0
    repos = json.loads(lock.read_bytes())
    assert set(repos) == {
        "stabilityai/stable-diffusion-xl-base-1.0",
        "stabilityai/stable-diffusion-xl-refiner-1.0",
        "madebyollin/sdxl-vae-fp16-fix",
    }
    server.calls.clear()
    assert main([*common, "--require-lock", "--output", str(tmp_path / "weights")]) == 0
    assert all(f"/resolve/{COMMIT}/" in call for call in server.calls)


def test_require_lock_refuses_what_is_not_locked(
    server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--profiles",
        "sdxl",
        "--endpoint",
        server.url,
        "--lock-file",
        str(tmp_path / "none.json"),
        "--require-lock",
    ]
    assert main([*arguments, "--output", str(tmp_path / "weights")]) == 1
    assert "is not in the lock file; write it with --lock" in capsys.readouterr().err
    assert server.calls == []


def test_command_runs_from_any_directory_without_torch_for_a_dry_run(tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    program = [sys.executable, "-c", code, str(ROOT / "download_weights.py"), "--dry-run", "--profiles", "sdxl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"


def test_every_row_that_is_baked_can_be_asked_for() -> None:
    profile: Profile = replace(SDXL)
    assert download_weights._profiles("sdxl, wan22_i2v_svi") == [profile, PROFILES["wan22_i2v_svi"]]
    assert download_weights._profiles(",".join(profiles.BAKES)) == [PROFILES[name] for name in profiles.BAKES]
