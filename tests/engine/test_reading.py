"""Chunks of a file land in the tensors that want them: every byte once, in the file's order, in the right dtype."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from engine.reading import MAX_SLICES, Chunk, Lane, Wanted, chunks
from engine.tensorfile import Spec, TensorWriter, read_offsets
from schemas.errors import WeightsCorrupt

CHUNK = 1024
SPECS = [
    Spec("odd", torch.int8, (3,)),  # what follows it begins at an odd byte
    Spec("large", torch.bfloat16, (40, 50)),  # four chunks
    Spec("scalar", torch.float32, ()),
    Spec("empty", torch.float32, (0, 4)),
    Spec("half", torch.float16, (30, 7)),
    Spec("eight", torch.float8_e4m3fn, (5, 5)),
]


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {spec.name: (8 * torch.randn(spec.shape, generator=generator)).to(spec.dtype) for spec in SPECS}


@pytest.fixture
def file(tmp_path: Path) -> Any:
    path = tmp_path / "model.safetensors"
    with TensorWriter(path, SPECS) as writer:
        for name, value in values().items():
            writer.write(name, value)
    with path.open("rb", buffering=0) as stream:
        yield stream


def wanted(file: BinaryIO, names: list[str], dtypes: dict[str, torch.dtype] | None = None) -> dict[str, Wanted]:
    places = read_offsets(file)
    assert places is not None
    dtype = {name: (dtypes or {}).get(name, places[name].dtype) for name in names}
    return {name: Wanted(places[name], torch.zeros(places[name].shape, dtype=dtype[name])) for name in names}


def deliver(file: BinaryIO, targets: dict[str, Wanted], lane: Lane | None = None) -> list[Chunk]:
    lane = lane or Lane("cpu", chunk_bytes=CHUNK)
    made = list(chunks(file, targets.values(), CHUNK))
    for chunk in made:
        lane.deliver(chunk)
    lane.close()
    return made


def names() -> list[str]:
    return [spec.name for spec in SPECS]


def test_every_tensor_is_what_was_written(file: BinaryIO) -> None:
    targets = wanted(file, names())
    deliver(file, targets)
    for name, value in values().items():
        assert torch.equal(targets[name].target.float(), value.float()), name


def test_dtypes_change_on_the_way_where_asked(file: BinaryIO) -> None:
    targets = wanted(file, names(), {"half": torch.float32, "large": torch.float32, "odd": torch.float32})
    deliver(file, targets)
    for name in ("half", "large", "odd"):
        assert torch.equal(targets[name].target, values()[name].float()), name


def test_every_byte_is_read_once_and_in_order(file: BinaryIO, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    whole = os.preadv

    def counted(fd: int, places: list[memoryview], offset: int) -> int:
        count = whole(fd, places, offset)
        reads.append((offset, count))
        return count

    monkeypatch.setattr(os, "preadv", counted)
    deliver(file, wanted(file, names()))
    end = 4096  # of the header
    for offset, count in reads:
        assert offset == end
        end += count
    assert end == file.seek(0, os.SEEK_END)


def test_reads_that_return_less_are_gone_on_with(file: BinaryIO, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, places, offset: whole(fd, [places[0][:7]], offset))
    targets = wanted(file, names())
    deliver(file, targets)
    assert torch.equal(targets["large"].target, values()["large"])


def test_what_nobody_wants_is_not_read(file: BinaryIO) -> None:
    made = deliver(file, targets := wanted(file, ["odd", "half"]))
    assert [(chunk.size_bytes, len(chunk.slices)) for chunk in made] == [(3, 1), (420, 1)]
    assert torch.equal(targets["half"].target, values()["half"])


def test_large_tensors_are_cut_and_small_ones_go_together(file: BinaryIO) -> None:
    made = list(chunks(file, wanted(file, names()).values(), CHUNK))
    assert [[piece.size_bytes for piece in chunk.slices] for chunk in made] == [
        [3], [1024], [1024], [1024], [928], [4, 420, 25],
    ]  # fmt: skip


def test_chunk_holds_no_more_slices_than_one_read_takes(tmp_path: Path) -> None:
    specs = [Spec(str(i), torch.int8, (1,)) for i in range(MAX_SLICES + 1)]
    with TensorWriter(tmp_path / "many", specs) as writer:
        for spec in specs:
            writer.write(spec.name, torch.ones(1, dtype=torch.int8))
    with (tmp_path / "many").open("rb", buffering=0) as stream:
        made = list(chunks(stream, wanted(stream, [spec.name for spec in specs]).values()))
    assert [len(chunk.slices) for chunk in made] == [MAX_SLICES, 1]


def test_file_that_lost_its_end_is_corrupt(file: BinaryIO) -> None:
    targets = wanted(file, names())
    os.truncate(str(file.name), 4096 + 2000)
    with pytest.raises(WeightsCorrupt, match=r"model\.safetensors is cut short"):
        deliver(file, targets)


def test_disk_that_fails_is_corrupt_weights(file: BinaryIO, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    targets = wanted(file, names())
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(WeightsCorrupt, match=r"model\.safetensors cannot be read"):
        deliver(file, targets)


def test_lane_uses_one_buffer_for_all_that_it_converts(file: BinaryIO) -> None:
    lane = Lane("cpu", chunk_bytes=CHUNK)
    made = chunks(file, wanted(file, ["large"], {"large": torch.float32}).values(), CHUNK)
    held = set()
    for chunk in made:
        lane.deliver(chunk)
        assert lane._buffer is not None
        held.add(lane._buffer.data_ptr())
    assert len(held) == 1
    assert lane.close() == 0.0


def test_lane_needs_no_buffer_for_the_hosts_own_memory(file: BinaryIO) -> None:
    lane = Lane("cpu", chunk_bytes=CHUNK)
    for chunk in chunks(file, wanted(file, names()).values(), CHUNK):
        lane.deliver(chunk)
    assert lane._buffer is None


@pytest.mark.gpu
def test_tensors_reach_the_card(file: BinaryIO) -> None:
    stream = torch.cuda.Stream()
    lane = Lane("cuda", stream, CHUNK)
    targets = {name: Wanted(each.stored, each.target.cuda()) for name, each in wanted(file, names()).items()}
    deliver(file, targets, lane)
    stream.synchronize()
    for name, value in values().items():
        assert torch.equal(targets[name].target.cpu().float(), value.float()), name
