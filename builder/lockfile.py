"""Read builder/requirements.lock, which `make lock` writes: every package of the image, by version and hash."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "builder" / "requirements.lock"


class Locked(NamedTuple):
    """One package of the lock. `needed_by`: normalised names, or '-r FILE' for what FILE itself asks for."""

    name: str
    version: str
    sha256: tuple[str, ...]
    needed_by: tuple[str, ...]


ENTRY = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[\w.!+]+) \\")
HASH = re.compile(r"    --hash=sha256:(?P<digest>[0-9a-f]{64})(?: \\)?")
REASON = re.compile(r"    # +(?:via )?(?P<name>-r \S+|[a-z0-9-]+)")


def normalised(name: str) -> str:
    """A package's name as the index compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(text: str) -> tuple[Locked, ...]:
    """The packages of a lock.

    Raises:
        ValueError: a line that is neither a pinned package, nor a hash, nor a comment; it names the line.
    """
    found: list[Locked] = []
    for line in text.splitlines():
        if not line or line.startswith("#") or line == "    # via":
            continue
        if match := ENTRY.fullmatch(line):
            found.append(Locked(match["name"], match["version"], (), ()))
        elif found and (match := HASH.fullmatch(line)):
            found[-1] = found[-1]._replace(sha256=(*found[-1].sha256, match["digest"]))
        elif found and (match := REASON.fullmatch(line)):
            found[-1] = found[-1]._replace(needed_by=(*found[-1].needed_by, match["name"]))
        else:
            raise ValueError(f"the lock has a line that pins nothing: {line.strip()}")
    return tuple(found)
