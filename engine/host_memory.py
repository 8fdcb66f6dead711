"""Host memory: how much of it this process may still take, and giving back what it has freed.

What may be taken is what the machine says, or its container, whichever is less. Linux lets a process take more than
there is and ends it later, without an exception. So whoever is about to take gigabytes asks here first. Memory that
files are cached in counts as free, because the system gives it back at once: a worker that has just read its weights
has filled its container with such memory up to the limit.
"""

import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

PROC = Path("/proc")
GROUPS = Path("/sys/fs/cgroup")


class _Names(NamedTuple):
    """What a version of control groups calls its files and counters. `limits`: the lowest one holds."""

    limits: tuple[str, ...]
    used: str
    files: tuple[str, ...]
    """Bytes of cached files."""
    busy: tuple[str, ...]
    """Those of them that are not given back at once: mapped (libraries at work), or still to be written."""


V1 = _Names(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
    ("total_mapped_file", "total_dirty", "total_writeback"),
)
V2 = _Names(
    ("memory.max", "memory.high"),
    "memory.current",
    ("active_file", "inactive_file"),
    ("file_mapped", "file_dirty", "file_writeback"),
)


def free_bytes(proc: Path = PROC, groups: Path = GROUPS) -> int:
    """What may still be taken. 0 where the machine does not say."""
    try:
        machine = int(_table((proc / "meminfo").read_text())["MemAvailable:"]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
    left = (_left(folder, names) for folder, names in _own_groups(proc, groups))
    return max(0, min([machine, *(each for each in left if each is not None)]))


def give_back_freed() -> None:
    """Let the C library return to the system what is free in the middle of its heap.

    By itself it returns only what is free at the end, and a worker grew by 21 to 67 MiB in 900 jobs without a leak.
    About a millisecond. Only glibc has it; elsewhere nothing is done.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _own_groups(proc: Path, groups: Path) -> Iterator[tuple[Path, _Names]]:
    """The memory groups that this process is in, with those around them.

    Inside a container the path that the process is told may lead nowhere: its own group is the mount's root then.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, names = groups, V2
        elif "memory" in controllers.split(","):
            root, names = groups / "memory", V1
        else:
            continue
        inner = PurePosixPath(path.lstrip("/"))
        for folder in (inner, *inner.parents):
            if ".." not in folder.parts and (root / folder).is_dir():
                yield root / folder, names


def _left(folder: Path, names: _Names) -> int | None:
    """Bytes to the group's limit; None if it has none."""
    limits = [int(text) for name in names.limits if (text := _read(folder / name)).isdigit()]
    used = _read(folder / names.used)
    if not limits or not used.isdigit():
        return None
    table = _table(_read(folder / "memory.stat"))
    files, busy = (sum(int(table.get(name, 0)) for name in each) for each in (names.files, names.busy))
    return min(limits) - int(used) + max(0, files - busy)


def _table(text: str) -> Mapping[str, str]:
    """First word of each line -> the second."""
    return {words[0]: words[1] for line in text.splitlines() if len(words := line.split()) > 1}


def _read(path: Path) -> str:
    """The file's text; '' if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
