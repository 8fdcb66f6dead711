"""Files that wait for the store: none is lost, damaged or half there, whoever is killed and when."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import outbox
from engine.outbox import Entry
from schemas.errors import DeliveryFailed, EncodingFailed, SettingsError, WorkerError
from tests.figures import Count, Figure
from tests.servers.buckets import media_file

pytest_plugins = ["tests.figures"]

ROOT = Path(__file__).resolve().parent.parent.parent


class Refused(DeliveryFailed):
    retryable = False


@pytest.fixture
def box(tmp_path: Path) -> Path:
    return tmp_path / "box"


def entry(tmp_path: Path, body: bytes = b"frames", key: str = "worker/ab/video.mp4") -> Entry:
    return Entry(key, media_file(tmp_path / "video.mp4", body))


def taken(box: Path) -> list[tuple[str, bytes]]:
    """Sweep, and say what was delivered."""
    found = []
    outbox.sweep(box, lambda each: found.append((each.key, each.file.path.read_bytes())))
    return found


def test_keep_and_sweep_hand_the_file_over_once(tmp_path: Path, box: Path) -> None:
    kept = entry(tmp_path)
    outbox.keep(box, kept)
    kept.file.path.unlink()
    found = []
    assert outbox.sweep(box, found.append) == 1
    assert found[0].key == kept.key
    assert (found[0].file.sha256, found[0].file.content_type, found[0].file.frames) == (
        kept.file.sha256,
        "video/mp4",
        81,
    )
    assert list(box.iterdir()) == []
    assert outbox.sweep(box, found.append) == 0


def test_keep_is_a_folder_of_file_and_facts(tmp_path: Path, box: Path) -> None:
    outbox.keep(box, entry(tmp_path))
    (place,) = box.iterdir()
    assert sorted(path.name for path in place.iterdir()) == ["entry.json", "file"]
    assert (place / "file").read_bytes() == b"frames"
    facts = json.loads((place / "entry.json").read_text())
    assert facts["key"] == "worker/ab/video.mp4"
    assert facts["file"]["size_bytes"] == 6
    assert (box.stat().st_mode & 0o777, place.stat().st_mode & 0o777) == (0o700, 0o700)


def test_keep_twice_is_one_entry(tmp_path: Path, box: Path) -> None:
    for _ in range(2):
        outbox.keep(box, entry(tmp_path))
    assert taken(box) == [("worker/ab/video.mp4", b"frames")]


def test_keep_holds_two_files_of_one_key(tmp_path: Path, box: Path) -> None:
    outbox.keep(box, entry(tmp_path, b"first"))
    outbox.keep(box, entry(tmp_path, b"second"))
    assert sorted(body for _, body in taken(box)) == [b"first", b"second"]


def test_keep_refuses_a_file_that_changed(tmp_path: Path, box: Path) -> None:
    kept = entry(tmp_path)
    kept.file.path.write_bytes(b"framez")
    with pytest.raises(DeliveryFailed, match="changed on the worker's disk"):
        outbox.keep(box, kept)
    assert list(box.iterdir()) == []


def test_keep_says_so_when_the_disk_is_full(tmp_path: Path, box: Path) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path; from engine import outbox;"
        " from tests.servers.buckets import media_file; from schemas.errors import DeliveryFailed\n"
        "file = media_file(Path(sys.argv[2]), b'x' * 200_000)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: outbox.keep(Path(sys.argv[1]), outbox.Entry('worker/ab/video.mp4', file))\n"
        "except DeliveryFailed as error: print(error.sentence)\n"
    )
    command = [sys.executable, "-c", code, str(box), str(tmp_path / "video.mp4")]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown == "the outbox could not keep worker/ab/video.mp4 (File too large)\n"
    assert list(box.iterdir()) == []


def test_sweep_goes_by_age(tmp_path: Path, box: Path) -> None:
    for number, age_s in enumerate((10, 30, 20)):
        outbox.keep(box, entry(tmp_path, str(age_s).encode(), f"worker/{number}/video.mp4"))
        newest = max(box.iterdir(), key=lambda place: place.stat().st_mtime_ns)
        os.utime(newest, (time.time() - age_s, time.time() - age_s))
    assert [body for _, body in taken(box)] == [b"30", b"20", b"10"]


def test_sweep_stops_at_a_store_that_is_out_and_keeps_everything(tmp_path: Path, box: Path) -> None:
    for number in range(3):
        outbox.keep(box, entry(tmp_path, b"x", f"worker/{number}/video.mp4"))
    asked = []

    def out(each: Entry) -> None:
        asked.append(each)
        raise DeliveryFailed("out")

    assert outbox.sweep(box, out) == 0
    assert len(asked) == 1
    assert len(taken(box)) == 3


def test_sweep_goes_on_when_another_worker_takes_an_entry_away(tmp_path: Path, box: Path) -> None:
    for number in range(3):
        outbox.keep(box, entry(tmp_path, b"x", f"worker/{number}/video.mp4"))

    def deliver(each: Entry) -> None:
        if "/1/" in each.key:
            shutil.rmtree(each.file.path.parent)
        each.file.path.read_bytes()

    assert outbox.sweep(box, deliver) == 2
    assert list(box.iterdir()) == []


@pytest.mark.parametrize("error", [Refused("no"), EncodingFailed("the file changed while it was delivered")])
def test_sweep_goes_on_past_an_entry_that_cannot_be_delivered(tmp_path: Path, box: Path, error: WorkerError) -> None:
    for number in range(3):
        outbox.keep(box, entry(tmp_path, b"x", f"worker/{number}/video.mp4"))

    def deliver(each: Entry) -> None:
        if "/1/" in each.key:
            raise error

    assert outbox.sweep(box, deliver) == 2
    assert [key for key, _ in taken(box)] == ["worker/1/video.mp4"]


@pytest.mark.parametrize("harm", ["flip", "shorten", "no-file", "no-facts", "bad-facts", "bad-size", "deep-facts"])
def test_sweep_sets_a_damaged_entry_aside_and_never_delivers_it(tmp_path: Path, box: Path, harm: str) -> None:
    outbox.keep(box, entry(tmp_path))
    outbox.keep(box, entry(tmp_path, b"whole", "worker/cd/video.mp4"))
    place = next(place for place in box.iterdir() if (place / "file").read_bytes() == b"frames")
    file, facts = place / "file", place / "entry.json"
    {
        "flip": lambda: file.write_bytes(b"framez"),
        "shorten": lambda: file.write_bytes(b"fram"),
        "no-file": file.unlink,
        "no-facts": facts.unlink,
        "bad-facts": lambda: facts.write_text('{"key": "x", "file": {}}'),
        "bad-size": lambda: facts.write_text(facts.read_text().replace('"size_bytes": 6', '"size_bytes": 7')),
        "deep-facts": lambda: facts.write_text("[" * 100_000),
    }[harm]()
    assert taken(box) == [("worker/cd/video.mp4", b"whole")]
    assert [place.name[:8] for place in box.iterdir()] == ["damaged-"]
    assert taken(box) == []


def test_sweep_delivers_what_a_later_version_says_more_of(tmp_path: Path, box: Path) -> None:
    outbox.keep(box, entry(tmp_path))
    (place,) = box.iterdir()
    facts = json.loads((place / "entry.json").read_text())
    facts["file"]["loudness"] = facts["priority"] = 5
    (place / "entry.json").write_text(json.dumps(facts))
    assert taken(box) == [("worker/ab/video.mp4", b"frames")]


def test_sweep_goes_on_past_an_entry_that_cannot_be_removed(
    tmp_path: Path, box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        outbox.keep(box, entry(tmp_path, b"x", f"worker/{number}/video.mp4"))
    rename, stuck = Path.rename, []

    def rename_once_stuck(self: Path, target: Path) -> Path:
        if not stuck:
            stuck.append(self)
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_once_stuck)
    assert outbox.sweep(box, lambda _: None) == 3
    assert list(box.iterdir()) == stuck


def test_keep_is_done_when_a_sweep_takes_the_entry_at_once(
    tmp_path: Path, box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivered, sync_folder = [], outbox._sync_folder

    def sweep_then_sync(folder: Path) -> None:
        if folder == box:
            delivered.extend(taken(box))
        sync_folder(folder)

    monkeypatch.setattr(outbox, "_sync_folder", sweep_then_sync)
    outbox.keep(box, entry(tmp_path))
    assert delivered == [("worker/ab/video.mp4", b"frames")]


def test_sweep_would_deliver_a_damaged_file_without_the_hash(
    tmp_path: Path, box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox.keep(box, entry(tmp_path))
    (place,) = box.iterdir()
    (place / "file").write_bytes(b"framez")
    believed = json.loads((place / "entry.json").read_text())["file"]["sha256"]
    monkeypatch.setattr(outbox.hashlib, "file_digest", lambda *_: SimpleNamespace(hexdigest=lambda: believed))
    assert taken(box) == [("worker/ab/video.mp4", b"framez")]


def test_sweep_clears_what_killed_workers_left_once_it_is_old(tmp_path: Path, box: Path) -> None:
    box.mkdir()
    for name, age_s in ((".in-old", 4000), (".out-old", 4000), (".in-new", 10)):
        (box / name).mkdir()
        (box / name / "file").write_bytes(b"x")
        os.utime(box / name, (time.time() - age_s, time.time() - age_s))
    assert taken(box) == []
    assert [place.name for place in box.iterdir()] == [".in-new"]


def test_sweep_of_no_folder_is_nothing(box: Path) -> None:
    assert outbox.sweep(box, lambda _: None) == 0


def test_prepare_makes_the_folder(box: Path) -> None:
    outbox.prepare(box)
    assert list(box.iterdir()) == []


def test_prepare_names_the_setting_when_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SettingsError, match=r"^WORKER_OUTBOX_DIR cannot be written \(Not a directory\)"):
        outbox.prepare(tmp_path / "file" / "box")


KEEP_FOR_EVER = """
import itertools, sys
from pathlib import Path
from engine import outbox
from tests.servers.buckets import media_file
box, work = map(Path, sys.argv[1:])
for number in itertools.count():
    file = media_file(work / f"{number}.mp4", number.to_bytes(4, "big") * 100_000)
    outbox.keep(box, outbox.Entry(f"worker/{number}/video.mp4", file))
    print(number, flush=True)
"""

SWEEP = """
import shutil, sys, time
from pathlib import Path
from engine import outbox
box, store = map(Path, sys.argv[1:])
def deliver(entry):
    # As a store does it: the object appears as a whole, and a second one of the same name is the same.
    target = store / entry.key.replace("/", "_")
    copy = target.with_suffix(f".{time.monotonic_ns()}")
    shutil.copyfile(entry.file.path, copy)
    time.sleep(0.002)
    copy.rename(target)
print("swept", outbox.sweep(box, deliver), flush=True)
"""


def python(code: str, *arguments: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def check_kill_in_keep(tmp_path: Path, seed: int) -> None:
    """Every entry that `keep` returned for is there, and every entry that is there is whole."""
    box, work = tmp_path / "box", tmp_path / "work"
    work.mkdir()
    writer = python(KEEP_FOR_EVER, box, work)
    writer.stdout.readline()
    time.sleep(random.Random(seed).uniform(0.0, 0.1))
    writer.send_signal(signal.SIGKILL)
    said = {0, *map(int, writer.communicate()[0].split())}
    found = dict(taken(box))
    assert {f"worker/{number}/video.mp4" for number in said} <= set(found)
    for key, body in found.items():
        assert body == int(key.split("/")[1]).to_bytes(4, "big") * 100_000
    assert not [place for place in box.iterdir() if place.name.startswith("damaged-")]


def check_kill_in_sweep(tmp_path: Path, seed: int) -> None:
    """What a killed sweeper has not delivered, the next one does, at once."""
    box, store = tmp_path / "box", tmp_path / "store"
    store.mkdir()
    for number in range(30):
        outbox.keep(box, entry(tmp_path, bytes([number]) * 50_000, f"worker/{number}/video.mp4"))
    killed = python(SWEEP, box, store)
    deadline = time.monotonic() + 30
    while not list(store.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(random.Random(seed).uniform(0.0, 0.05))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    python(SWEEP, box, store).communicate()
    check_store(store, 30)
    assert [place.name for place in box.iterdir() if not place.name.startswith(".out-")] == []


def check_store(store: Path, count: int) -> None:
    for number in range(count):
        assert (store / f"worker_{number}_video.mp4").read_bytes() == bytes([number]) * 50_000


def test_keep_is_whole_or_absent_after_a_kill(tmp_path: Path) -> None:
    check_kill_in_keep(tmp_path, 0)


def test_sweep_goes_on_where_a_killed_one_stopped(tmp_path: Path) -> None:
    check_kill_in_sweep(tmp_path, 0)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 31))
def test_outbox_survives_thirty_kills_each(tmp_path: Path, seed: int, figure: Figure) -> None:
    (tmp_path / "keep").mkdir()
    (tmp_path / "sweep").mkdir()
    check_kill_in_keep(tmp_path / "keep", seed)
    check_kill_in_sweep(tmp_path / "sweep", seed)
    figure("outbox whole after kill -9 while it was filled and while it was swept", Count(2, 2))


def test_sweep_by_two_workers_at_once_loses_and_damages_nothing(tmp_path: Path) -> None:
    box, store = tmp_path / "box", tmp_path / "store"
    store.mkdir()
    for number in range(60):
        outbox.keep(box, entry(tmp_path, bytes([number]) * 50_000, f"worker/{number}/video.mp4"))
    workers = [python(SWEEP, box, store) for _ in range(2)]
    said = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    check_store(store, 60)
    assert list(box.iterdir()) == []
