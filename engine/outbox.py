"""Finished files that the store has not taken yet, on disk, so that they outlive the worker that made them.

An entry is a folder `<hash>/` with `file` and `entry.json`, made under a hidden name and renamed, so that it
is there as a whole or not at all. There is no lock, and so none that a killed worker could leave behind:
delivery is idempotent, an entry that a second worker delivers at the same time ends in the same object, and
whoever comes second finds the entry gone. Keys and hashes are kept here, credentials never.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from engine.outputs import MediaFile
from schemas.errors import DeliveryFailed, EncodingFailed, SettingsError

COPY_BYTES = 2**20
STALE_S = 3600.0
"""A hidden folder older than this belongs to a worker that was killed while it wrote or removed it."""

_ENTRY_NAME = re.compile(r"[0-9a-f]{32}")
_FACTS = frozenset(fact.name for fact in fields(MediaFile)) - {"path"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A file and the key it shall have."""

    key: str
    file: MediaFile


def prepare(folder: Path) -> None:
    """Make the folder and write in it once: a missing outbox must be found at start, not in an outage.

    Raises:
        SettingsError: it cannot be written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise SettingsError(f"WORKER_OUTBOX_DIR cannot be written ({error.strerror}); name another folder") from error


def keep(folder: Path, entry: Entry) -> None:
    """Copy the file in; when this returns, it survives the process and the machine's power.

    Raises:
        DeliveryFailed: the folder cannot take it, or the file is not what its hash says.
    """
    target = folder / _name(entry)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".in-", dir=folder))
        try:
            _write(work, entry)
            try:
                work.rename(target)
            except OSError:
                if not target.is_dir():  # otherwise the very same file is in already, perhaps since a moment ago
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
        _sync_folder(folder)
    except OSError as error:
        raise DeliveryFailed(f"the outbox could not keep {entry.key} ({error.strerror})") from error
    _log.warning("outbox keeps %s, %d bytes", entry.key, entry.file.size_bytes)


def sweep(folder: Path, deliver: Callable[[Entry], None]) -> int:
    """Hand every entry, oldest first, to `deliver` and remove it when that returns; return how many went.

    An entry that is refused stays. One that is damaged is set aside as `damaged-…`, for a person to look at.
    The first failure that may pass ends the sweep: a store that is out for one entry is out for all.
    """
    delivered = 0
    _clear_stale(folder)
    for place in _places(folder):
        entry = _read(place)
        if entry is None:
            continue
        try:
            deliver(entry)
            delivered += 1
            _remove(place)
        except DeliveryFailed as error:
            _log.warning("outbox: %s stays: %s", entry.key, error.sentence)
            if error.retryable:
                break
        except EncodingFailed as error:  # it has changed since it was read; the next sweep will find it damaged
            _log.error("outbox: %s stays: %s", entry.key, error.sentence)
        except OSError as error:
            if place.exists():  # otherwise another worker delivered it meanwhile
                _log.error("outbox: %s stays, it cannot be read or removed: %s", entry.key, error.strerror)
    return delivered


def _name(entry: Entry) -> str:
    return hashlib.sha256(f"{entry.key}\n{entry.file.sha256}".encode()).hexdigest()[:32]


def _write(place: Path, entry: Entry) -> None:
    digest = hashlib.sha256()
    with entry.file.path.open("rb") as source, (place / "file").open("xb") as copy:
        while piece := source.read(COPY_BYTES):
            digest.update(piece)
            copy.write(piece)
        copy.flush()
        os.fsync(copy.fileno())
    if digest.hexdigest() != entry.file.sha256:
        raise DeliveryFailed(f"the outbox could not keep {entry.key}: the file changed on the worker's disk")
    facts = {name: value for name, value in asdict(entry.file).items() if name != "path"}
    with (place / "entry.json").open("x") as target:
        json.dump({"key": entry.key, "file": facts}, target)
        target.flush()
        os.fsync(target.fileno())
    _sync_folder(place)


def _places(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    ages = []
    for place in folder.iterdir():
        if _ENTRY_NAME.fullmatch(place.name):
            with suppress(FileNotFoundError):
                ages.append((place.stat().st_mtime, place))
    return [place for _, place in sorted(ages)]


def _read(place: Path) -> Entry | None:
    """The entry, its file's size and hash checked; None if it is gone or has just been set aside.

    A later version of the worker may have written more about the file than this one knows.
    """
    try:
        record = json.loads((place / "entry.json").read_bytes())
        facts = {name: value for name, value in record["file"].items() if name in _FACTS}
        file = MediaFile(path=place / "file", **facts)
        entry = Entry(str(record["key"]), file)
        with file.path.open("rb") as source:
            is_size = os.fstat(source.fileno()).st_size == file.size_bytes
            if is_size and hashlib.file_digest(source, "sha256").hexdigest() == file.sha256:
                return entry
    except FileNotFoundError:
        if not place.exists():
            return None
    except OSError as error:
        _log.error("outbox: %s stays, it cannot be read: %s", place.name, error.strerror)
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        _log.error("outbox: the record in %s cannot be read: %s", place.name, type(error).__name__)
    _log.error("outbox: %s is damaged and was set aside", place.name)
    with suppress(OSError):
        place.rename(place.with_name(f"damaged-{place.name}"))
    return None


def _remove(place: Path) -> None:
    """Take the entry out of sight in one step, then off the disk: half an entry looks damaged to others."""
    hidden = place.with_name(f".out-{place.name}-{os.getpid()}-{time.monotonic_ns()}")
    with suppress(FileNotFoundError):
        place.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _clear_stale(folder: Path) -> None:
    if not folder.is_dir():
        return
    for place in [*folder.glob(".in-*"), *folder.glob(".out-*")]:
        with suppress(FileNotFoundError):
            if time.time() - place.stat().st_mtime > STALE_S:
                shutil.rmtree(place, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
