"""Fetching from a hub: whole files only, cut transfers go on, and every refusal says what to do."""

import errno
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import hub as hub_module
from engine.hub import BakeFailed, FolderHub, HuggingFaceHub, Lock, RemoteFile, look_up
from engine.profile import Source
from tests.servers.hub_server import COMMIT, HubServer

SOURCE = Source("owner/model")
WEIGHTS = bytes(range(256)) * 400  # 102,400 bytes


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    folder = tmp_path / "hub" / "owner" / "model" / "unet"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text('{"a": 1}')
    with HubServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits a second between its five attempts at a cut transfer."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 8192)  # it writes whole chunks only


def hub_of(server: HubServer, lock: Lock | None = None) -> HuggingFaceHub:
    return HuggingFaceHub(lock or Lock(), endpoint=server.url)


def file_named(hub: HuggingFaceHub, name: str) -> RemoteFile:
    return next(file for file in hub.files(SOURCE, "unet") if file.name == name)


def test_hub_lists_large_files_by_sha256_and_small_ones_by_git_sha1(server: HubServer) -> None:
    config, weights = hub_of(server).files(SOURCE, "unet")
    assert config == RemoteFile("unet/config.json", 8, None, "4a036f56bb619924ec4189bd84ed716c766971ae")
    assert weights == RemoteFile("unet/model.safetensors", 102_400, hashlib.sha256(WEIGHTS).hexdigest(), None)


def test_hub_fetches_a_file_whole(server: HubServer, tmp_path: Path) -> None:
    hub = hub_of(server)
    hub.fetch(SOURCE, file_named(hub, "model.safetensors"), tmp_path / "out" / "model.safetensors")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_hub_fetches_nothing_when_the_file_is_there(server: HubServer, tmp_path: Path) -> None:
    hub = hub_of(server)
    file = file_named(hub, "model.safetensors")
    hub.fetch(SOURCE, file, tmp_path / "model.safetensors")
    hub.fetch(SOURCE, file, tmp_path / "model.safetensors")
    assert server.sent == [("owner/model/unet/model.safetensors", 0, 102_400)]


def test_hub_fetches_anew_what_an_older_commit_left(server: HubServer, tmp_path: Path) -> None:
    hub_of(server).fetch(SOURCE, file_named(hub_of(server), "model.safetensors"), tmp_path / "model.safetensors")
    (server.root / "owner/model/unet/model.safetensors").write_bytes(WEIGHTS[::-1])
    hub_of(server).fetch(SOURCE, file_named(hub_of(server), "model.safetensors"), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS[::-1]


def test_hub_names_a_full_disk(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    hub = hub_of(server)
    file = file_named(hub, "model.safetensors")
    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(BakeFailed, match=r"could not be fetched \(No space left on device\)"):
        hub.fetch(SOURCE, file, tmp_path / "model.safetensors")


def test_hub_goes_on_where_a_cut_transfer_stopped_in_a_new_process(server: HubServer, tmp_path: Path) -> None:
    file = file_named(hub_of(server), "model.safetensors")
    server.faults.cut_after = {"owner/model/unet/model.safetensors": 40_000}
    with pytest.raises(BakeFailed, match="run again, it goes on"):
        hub_of(server).fetch(SOURCE, file, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "model.safetensors.partial").stat().st_size == 32_768
    server.faults.cut_after = {}
    server.sent.clear()
    hub_of(server).fetch(SOURCE, file, tmp_path / "model.safetensors")
    assert server.sent == [("owner/model/unet/model.safetensors", 32_768, 69_632)]
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_hub_refuses_wrong_bytes_and_starts_anew(server: HubServer, tmp_path: Path, name: str) -> None:
    hub = hub_of(server)
    server.faults.wrong_bytes = {f"owner/model/unet/{name}"}
    with pytest.raises(BakeFailed, match=rf"owner/model/unet/{name} came with wrong bytes"):
        hub.fetch(SOURCE, file_named(hub, name), tmp_path / name)
    assert list(tmp_path.glob(f"{name}*")) == []
    server.faults.wrong_bytes = set()
    hub.fetch(SOURCE, file_named(hub, name), tmp_path / name)
    assert (tmp_path / name).is_file()


def test_hub_refuses_a_partial_file_of_other_bytes(server: HubServer, tmp_path: Path) -> None:
    hub = hub_of(server)
    (tmp_path / "model.safetensors.partial").write_bytes(b"x" * 50_000)
    with pytest.raises(BakeFailed, match="wrong bytes"):
        hub.fetch(SOURCE, file_named(hub, "model.safetensors"), tmp_path / "model.safetensors")
    hub.fetch(SOURCE, file_named(hub, "model.safetensors"), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_hub_starts_anew_when_the_partial_file_is_too_long(server: HubServer, tmp_path: Path) -> None:
    hub = hub_of(server)
    (tmp_path / "model.safetensors.partial").write_bytes(b"x" * 200_000)
    hub.fetch(SOURCE, file_named(hub, "model.safetensors"), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (401, "GatedRepo", "owner/model is gated: accept its terms"),
        (403, "GatedRepo", "owner/model is gated: accept its terms"),
        (401, "RepoNotFound", "does not exist, or HF_TOKEN may not read it"),
        (404, "RepoNotFound", "does not exist, or HF_TOKEN may not read it"),
        (404, "RevisionNotFound", "no such commit any more"),
        (403, "", "access denied \\(403\\)"),
        (501, "", "the hub answered 501"),
    ],
)
def test_hub_says_why_a_repository_is_refused(server: HubServer, status: int, code: str, sentence: str) -> None:
    server.faults.status = {"owner/model": (status, code)}
    with pytest.raises(BakeFailed, match=sentence):
        hub_of(server).commit(SOURCE)


def test_hub_names_a_file_that_is_gone(server: HubServer, tmp_path: Path) -> None:
    hub = hub_of(server)
    file = file_named(hub, "model.safetensors")
    server.faults.missing = {"owner/model/unet/model.safetensors"}
    with pytest.raises(BakeFailed, match=r"owner/model/unet/model\.safetensors is not there"):
        hub.fetch(SOURCE, file, tmp_path / "model.safetensors")


def test_hub_names_a_folder_that_is_gone(server: HubServer) -> None:
    with pytest.raises(BakeFailed, match="owner/model is not there"):
        hub_of(server).files(SOURCE, "vae")


def test_hub_says_when_nobody_answers(server: HubServer) -> None:
    hub = HuggingFaceHub(endpoint="http://127.0.0.1:9")
    with pytest.raises(BakeFailed, match="could not be fetched"):
        hub.commit(SOURCE)


def test_hub_follows_to_the_store_of_large_files_without_the_token(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub = hub_of(server)
    with HubServer(server.root) as store:
        server.faults.redirect_to = store.url
        hub.fetch(SOURCE, file_named(hub, "model.safetensors"), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
    assert (server.tokens, store.tokens) == ({"Bearer hf_secret"}, {""})


def test_hub_asks_once_for_the_commit_of_a_branch(server: HubServer) -> None:
    hub = hub_of(server)
    assert [hub.commit(SOURCE), hub.commit(SOURCE)] == [COMMIT, COMMIT]
    assert server.calls == ["/api/models/owner/model/revision/main"]


def test_locked_hub_fetches_the_locked_commit_and_asks_nothing(server: HubServer, tmp_path: Path) -> None:
    lock = look_up(hub_of(server), {SOURCE: ["unet"]})
    server.calls.clear()
    hub = hub_of(server, lock)
    hub.fetch(SOURCE, file_named(hub, "config.json"), tmp_path / "config.json")
    assert server.calls == [f"/owner/model/resolve/{COMMIT}/unet/config.json"]


def test_locked_hub_refuses_a_file_that_changed_after_the_lock(server: HubServer, tmp_path: Path) -> None:
    lock = look_up(hub_of(server), {SOURCE: ["unet"]})
    hub = hub_of(server, lock)
    (server.root / "owner/model/unet/config.json").write_text('{"a": 2}')
    with pytest.raises(BakeFailed, match="wrong bytes"):
        hub.fetch(SOURCE, file_named(hub, "config.json"), tmp_path / "config.json")


def test_hub_refuses_an_unlocked_repository_when_a_lock_is_required(server: HubServer) -> None:
    hub = HuggingFaceHub(Lock(), endpoint=server.url, require_lock=True)
    with pytest.raises(BakeFailed, match="owner/model is not in the lock file"):
        hub.commit(SOURCE)
    assert server.calls == []


def test_lock_reads_what_it_wrote(server: HubServer, tmp_path: Path) -> None:
    lock = look_up(hub_of(server), {SOURCE: ["unet"]})
    lock.write(tmp_path / "weights.lock.json")
    assert Lock.read(tmp_path / "weights.lock.json") == lock
    assert lock.commits == {"owner/model": COMMIT}


def test_lock_is_empty_without_a_file(tmp_path: Path) -> None:
    assert Lock.read(tmp_path / "none.json") == Lock()


@pytest.mark.parametrize("text", ["", "[]", '{"owner/model": {}}', '{"owner/model": {"commit": "a", "files": [1]}}'])
def test_lock_refuses_another_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "weights.lock.json").write_text(text)
    with pytest.raises(BakeFailed, match="not a lock file"):
        Lock.read(tmp_path / "weights.lock.json")


def test_folder_hub_has_another_commit_after_a_change(tmp_path: Path) -> None:
    folder = tmp_path / "owner" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("1")
    before = FolderHub(tmp_path).commit(SOURCE)
    (folder / "config.json").write_text("2")
    assert FolderHub(tmp_path).commit(SOURCE) != before


def test_hub_lets_a_bug_through() -> None:
    """Only the client's own errors are explained; anything else keeps its traceback."""
    with pytest.raises(ZeroDivisionError), hub_module._explained("owner/model"):
        raise ZeroDivisionError
