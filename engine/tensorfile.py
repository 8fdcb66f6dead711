"""Safetensors files, tensor by tensor: read in any published form, written in the order we want.

The library's own writer sorts tensors by dtype and name, and needs all of them in memory. A bake handles 66
GB on a small machine, and a worker wants tensors in the order in which they run, so that the first block can
work while the rest is still read.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from os import SEEK_END
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open

from schemas.errors import WeightsCorrupt

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Our names of dtypes -> torch's."""

CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}
"""torch's dtypes -> the names in a safetensors header."""

DTYPE_OF = {code: dtype for dtype, code in CODES.items()}

ALIGNMENT = 4096  # bytes before the first tensor: a page, so that direct reads can begin there
MAX_HEADER_BYTES = 100_000_000  # the safetensors library refuses longer ones too


class Spec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Stored(NamedTuple):
    """A tensor inside a file: its bytes begin at `offset`, counted from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)  # torch's own product would overflow on a forged shape


def read_offsets(stream: BinaryIO) -> dict[str, Stored] | None:
    """Where each tensor of an open safetensors file is, in the order of the file; None if a dtype is not ours.

    The library hands out tensors, not places; large reads need the places. Every byte after the header belongs to
    exactly one tensor, or the file is refused.

    Raises:
        WeightsCorrupt: it is no safetensors file, or tensors overlap, leave gaps, or end elsewhere than the file.
    """
    name = Path(str(stream.name)).name
    try:
        size_bytes = stream.seek(0, SEEK_END)
        first, found = _read_header(stream, size_bytes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsCorrupt(f"the header of {name} cannot be read; bake it again") from error
    end = 0
    places: dict[str, Stored] = {}
    for tensor, (code, shape, begins, ends) in sorted(found.items(), key=lambda item: item[1][2:]):
        if begins != end or ends < begins:
            raise WeightsCorrupt(f"the tensors of {name} overlap or leave a gap at {tensor}")
        end = ends
        if code in DTYPE_OF:
            places[tensor] = Stored(DTYPE_OF[code], shape, first + begins)
            if places[tensor].size_bytes != ends - begins:
                raise WeightsCorrupt(f"{tensor} of {name} has another size than its shape")
    if first + end != size_bytes:
        raise WeightsCorrupt(f"{name} ends elsewhere than its tensors")
    return places if len(places) == len(found) else None


_Entry = tuple[str, tuple[int, ...], int, int]
"""dtype, shape, where it begins and ends."""


def _read_header(stream: BinaryIO, size_bytes: int) -> tuple[int, dict[str, _Entry]]:
    """Where the first tensor begins, and what the header says of each. Raises what a forged one may cause."""
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if size_bytes < 8 or length > min(size_bytes - 8, MAX_HEADER_BYTES):
        raise ValueError("not a safetensors file")
    header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return 8 + length, {tensor: _entry(entry) for tensor, entry in header.items()}


def _entry(entry: Any) -> _Entry:
    shape = tuple(entry["shape"])
    begins, ends = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begins, ends)):
        raise ValueError("a size that is no size")
    return str(entry["dtype"]), shape, begins, ends


class TensorFiles:
    """The tensors of one component in `folder`, in one file or in shards with an index.

    Raises:
        WeightsCorrupt: there are none, or the index cannot be read or names another file than a shard beside it.
    """

    def __init__(self, folder: Path, variant: str | None = None) -> None:
        names = weight_files((path.name for path in folder.iterdir()), variant)
        if not names:
            raise WeightsCorrupt(f"no safetensors files in {folder.name}")
        self._folder = folder
        self._open: tuple[str, Any] | None = None
        self._file_of = self._index(names)

    def names(self) -> list[str]:
        """The names of all tensors, in no order."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._read(name, "get_slice").get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in the file's dtype, mapped and not yet read."""
        tensor: torch.Tensor = self._read(name, "get_tensor")
        return tensor

    def _read(self, name: str, method: Literal["get_slice", "get_tensor"]) -> Any:
        handle = self._handle(self._file_of[name])
        try:
            return getattr(handle, method)(name)
        except SafetensorError as error:
            raise WeightsCorrupt(f"{name} is not in {self._file_of[name]}") from error

    def _index(self, names: Sequence[str]) -> dict[str, str]:
        if names[0].endswith(".safetensors"):
            return dict.fromkeys(self._handle(names[0]).keys(), names[0])
        try:
            file_of = dict(json.loads((self._folder / names[0]).read_bytes())["weight_map"])
            strange = set(file_of.values()) - set(names[1:])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise WeightsCorrupt(f"{names[0]} is not a readable index") from error
        if strange:  # a path out of the folder, say
            raise WeightsCorrupt(f"{names[0]} names {strange.pop()}, which is no shard beside it")
        return file_of

    def _handle(self, name: str) -> Any:
        """Shards are read one after the other; keeping one open keeps their pages from piling up."""
        if self._open is None or self._open[0] != name:
            try:
                self._open = (name, safe_open(self._folder / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise WeightsCorrupt(f"{name} is not a readable safetensors file") from error
        return self._open[1]


class TensorWriter:
    """Writes one safetensors file in the order of `specs`. Memory: one tensor.

    Used as a context manager; leaving it without an error checks that every tensor was written.
    """

    def __init__(self, path: Path, specs: Sequence[Spec]) -> None:
        self._specs = list(specs)
        self._done = 0
        self._file = path.open("wb")
        self._file.write(_header(self._specs))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor, which must be the next of the specs, in its dtype and shape.

        Raises:
            ValueError: it is another one.
        """
        spec = self._specs[self._done] if self._done < len(self._specs) else None
        if spec != (name, tensor.dtype, tuple(tensor.shape)):
            raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)} is not the next tensor, {spec}")
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._done += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None and self._done != len(self._specs):
            raise ValueError(f"{len(self._specs) - self._done} tensors were not written")


def weight_files(names: Iterable[str], variant: str | None) -> list[str]:
    """Those of a folder's `names` that hold its weights: one file, or an index and its shards; [] if none do.

    Both libraries' names are known: diffusion_pytorch_model and model. Variant as in model.fp16.safetensors.
    """
    present = set(names)
    infix = f".{variant}" if variant else ""
    for stem in ("diffusion_pytorch_model", "model"):
        if f"{stem}{infix}.safetensors" in present:
            return [f"{stem}{infix}.safetensors"]
        index = f"{stem}.safetensors.index{infix}.json"
        if index in present:
            shard = re.compile(re.escape(stem + infix) + r"-\d{5}-of-\d{5}\.safetensors")
            return [index, *sorted(name for name in present if shard.fullmatch(name))]
    return []


def _header(specs: Sequence[Spec]) -> bytes:
    """The length and the JSON header, padded with spaces so that the first tensor begins on a page."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.size_bytes
        entries[spec.name] = {
            "dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded = -(-(len(text) + 8) // ALIGNMENT) * ALIGNMENT - 8
    return padded.to_bytes(8, "little") + text.ljust(padded)
