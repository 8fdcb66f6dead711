"""Figures on the disk, from the moment they are there."""

import json
from pathlib import Path


def keep(path: Path, found: object) -> None:
    """Write `found` as JSON, whole or not at all: a run may be cut at any moment, this one too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(json.dumps(found, indent=1))
    partial.replace(path)
