"""The top level of an MP4: which boxes, in which order, each whole. Source: ISO/IEC 14496-12, 4.2."""

from pathlib import Path
from typing import NamedTuple

_SMALL_HEADER, _LARGE_HEADER = 8, 16


class Box(NamedTuple):
    kind: str
    offset: int
    size_bytes: int


def top_boxes(path: Path) -> list[Box]:
    """Walk a file's top-level boxes without a library.

    Raises:
        ValueError: a box is cut, or its size makes no sense.
    """
    end = path.stat().st_size
    boxes: list[Box] = []
    offset = 0
    with path.open("rb") as file:
        while offset < end:
            file.seek(offset)
            header = file.read(_LARGE_HEADER)
            if len(header) < _SMALL_HEADER:
                raise ValueError(f"{len(header)} bytes behind the last box")
            size, least = int.from_bytes(header[:4], "big"), _SMALL_HEADER
            if size == 1:  # a 64-bit size follows the kind
                size, least = int.from_bytes(header[8:], "big"), _LARGE_HEADER
            kind = header[4:8].decode("latin-1")
            # size 0 means "to the end of the file", which a cut file cannot be told from
            if size < least or offset + size > end:
                raise ValueError(f"box {kind!r} at {offset} has {size} bytes, but the file ends at {end}")
            boxes.append(Box(kind, offset, size))
            offset += size
    return boxes


def check_streamable(boxes: list[Box]) -> None:
    """Refuse a file that a player cannot start before it has all of it: ftyp first, moov before mdat.

    Raises:
        ValueError: says which box stands where.
    """
    kinds = [box.kind for box in boxes]
    order = [kind for kind in kinds if kind in ("ftyp", "moov", "mdat")]
    if order != ["ftyp", "moov", "mdat"] or kinds[0] != "ftyp":
        raise ValueError(f"its boxes are {', '.join(kinds) or 'none'}, not ftyp, moov, mdat")
