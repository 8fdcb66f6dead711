"""Our safetensors files are the library's safetensors files, in our order."""

import errno
import io
import json
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.tensorfile import Spec, Stored, TensorFiles, TensorWriter, read_offsets, weight_files
from schemas.errors import WeightsCorrupt

SPECS = [
    Spec("b", torch.bfloat16, (2, 3)),
    Spec("a", torch.float32, (4,)),
    Spec("c", torch.float16, ()),
    Spec("d", torch.int8, (5,)),
]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {spec.name: (8 * torch.randn(spec.shape, generator=generator)).to(spec.dtype) for spec in SPECS}


def written(path: Path) -> dict[str, torch.Tensor]:
    values = tensors()
    with TensorWriter(path, SPECS) as writer:
        for name, value in values.items():
            writer.write(name, value)
    return values


def test_writer_writes_what_the_library_reads(tmp_path: Path) -> None:
    values = written(tmp_path / "x.safetensors")
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == values.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in values.items())


def test_writer_keeps_the_order_and_begins_on_a_page(tmp_path: Path) -> None:
    written(tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 4096 == 0
    assert [(name, entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"] == [
        ("b", [0, 12]), ("a", [12, 28]), ("c", [28, 30]), ("d", [30, 35]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("a", torch.zeros(2, 3, dtype=torch.bfloat16)),
        ("b", torch.zeros(2, 3)),
        ("b", torch.zeros(3, 2, dtype=torch.bfloat16)),
    ],
)
def test_writer_refuses_another_tensor_than_the_next(tmp_path: Path, name: str, tensor: torch.Tensor) -> None:
    writer = TensorWriter(tmp_path / "x.safetensors", SPECS)
    with pytest.raises(ValueError, match="is not the next tensor"):
        writer.write(name, tensor)


def test_writer_refuses_to_end_early(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 tensors were not written"), TensorWriter(tmp_path / "x", SPECS) as writer:
        writer.write("b", tensors()["b"])


def test_writer_writes_a_transposed_tensor_in_its_own_order(tmp_path: Path) -> None:
    value = torch.arange(6.0).reshape(2, 3).T
    with TensorWriter(tmp_path / "x.safetensors", [Spec("a", torch.float32, (3, 2))]) as writer:
        writer.write("a", value)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], value)


def test_files_reads_one_file(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert (files.names(), files.shape("a"), files.tensor("a").tolist()) == (["a"], (3,), [0, 1, 2])


def test_files_reads_shards_by_their_index(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"a": torch.tensor(1)}, tmp_path / names[0])
    save_file({"b": torch.tensor(2)}, tmp_path / names[1])
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    files = TensorFiles(tmp_path)
    assert [files.tensor("b").item(), files.tensor("a").item(), files.tensor("b").item()] == [2, 1, 2]


@pytest.mark.parametrize("shard", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
def test_files_refuses_an_index_that_names_what_is_not_there(tmp_path: Path, shard: str) -> None:
    """The first shard is there without the tensor, the second not at all."""
    save_file({"a": torch.tensor(1)}, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": shard}}))
    with pytest.raises(WeightsCorrupt, match=shard):
        TensorFiles(tmp_path).shape("b")


def test_files_refuses_an_index_that_leads_out_of_the_folder(tmp_path: Path) -> None:
    save_file({"a": torch.tensor(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(WeightsCorrupt, match=r"names \.\./secret\.safetensors, which is no shard beside it"):
        TensorFiles(folder)


NO_INDEX = {
    "nothing": b"", "a list": b"[]", "no map": b"{}", "a number": b'{"weight_map": 1}',
    "a list of files": b'{"weight_map": {"a": [1]}}', "deep": b"[" * 100_000, "no text": b"\x80",
}  # fmt: skip


@pytest.mark.parametrize("data", NO_INDEX.values(), ids=NO_INDEX)
def test_files_refuses_what_is_no_index(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    with pytest.raises(WeightsCorrupt, match=r"model\.safetensors\.index\.json is not a readable index"):
        TensorFiles(tmp_path)


def test_files_refuses_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsCorrupt, match="no safetensors files"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_files_refuses_what_is_no_safetensors_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(WeightsCorrupt, match=r"model\.safetensors is not a readable"):
        TensorFiles(tmp_path)


def test_files_refuses_a_file_that_is_cut_short(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(WeightsCorrupt):
        TensorFiles(tmp_path)


@pytest.mark.parametrize(
    ("names", "variant", "expected"),
    [
        (["model.safetensors", "config.json"], None, ["model.safetensors"]),
        (["model.fp16.safetensors", "model.safetensors"], "fp16", ["model.fp16.safetensors"]),
        (["model.fp16.safetensors"], None, []),
        (
            ["diffusion_pytorch_model.safetensors", "sdxl_vae.safetensors"],
            None,
            ["diffusion_pytorch_model.safetensors"],
        ),
        (
            ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors"],
            None,
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (["pytorch_model.bin", "model.onnx"], None, []),
    ],
)
def test_weight_files_takes_what_is_needed_and_no_more(
    names: list[str], variant: str | None, expected: list[str]
) -> None:
    assert weight_files(names, variant) == expected


def entry(dtype: str, shape: list[Any], begins: Any, ends: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begins, ends]}


def offsets(path: Path, header: Any, size_bytes: int = 16, length: int | None = None) -> dict[str, Stored] | None:
    """Of a file with this header and so many bytes of tensors."""
    text = json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(size_bytes))
    with path.open("rb") as stream:
        return read_offsets(stream)


def test_offsets_are_where_the_tensors_are(tmp_path: Path) -> None:
    values = written(tmp_path / "x.safetensors")
    with (tmp_path / "x.safetensors").open("rb") as stream:
        found = read_offsets(stream)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert found is not None
    assert list(found) == ["b", "a", "c", "d"]
    for name, (dtype, shape, offset) in found.items():
        count = values[name].numel()
        read = torch.frombuffer(bytearray(data[offset : offset + found[name].size_bytes]), dtype=dtype, count=count)
        assert torch.equal(read.view(shape), values[name])


def test_offsets_are_those_of_the_librarys_own_files(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, tmp_path / "x")
    with (tmp_path / "x").open("rb") as stream:
        found = read_offsets(stream)
    assert found is not None
    assert {name: (each.dtype, each.shape) for name, each in found.items()} == {
        "a": (torch.float32, (3,)), "b": (torch.bfloat16, (2, 2)),
    }  # fmt: skip


def test_offsets_are_not_told_of_a_dtype_that_no_bake_writes(tmp_path: Path) -> None:
    header = {"a": entry("I64", [1], 0, 8), "b": entry("F32", [2], 8, 16)}
    assert offsets(tmp_path / "x", header) is None


BROKEN: dict[str, dict[str, Any]] = {
    "overlap": {"a": entry("F32", [2], 0, 8), "b": entry("F32", [3], 4, 16)},
    "the same place": {"a": entry("F32", [4], 0, 16), "b": entry("F32", [4], 0, 16)},
    "gap": {"a": entry("F32", [1], 0, 4), "b": entry("F32", [2], 8, 16)},
    "begins late": {"a": entry("F32", [3], 4, 16)},
    "backwards": {"a": entry("F32", [4], 16, 0)},
    "behind the end of the file": {"a": entry("F32", [5], 0, 20)},
    "before the end of the file": {"a": entry("F32", [3], 0, 12)},
    "no tensors at all": {},
    "shape larger than its bytes": {"a": entry("F32", [5], 0, 16)},
    "shape whose product overflows": {"a": entry("F32", [2**32, 2**32], 0, 0), "b": entry("F32", [4], 0, 16)},
    "negative": {"a": entry("F32", [4], -16, 0)},
    "fraction": {"a": entry("F32", [4], 0, 16.0)},
    "truth": {"a": entry("I8", [True] * 2, 0, True), "b": entry("I8", [15], 1, 16)},
    "text": {"a": entry("F32", ["4"], 0, 16)},
    "nothing": {"a": None},
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "three offsets": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}},
    "no shape": {"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}},
}


@pytest.mark.parametrize("header", BROKEN.values(), ids=BROKEN)
def test_offsets_of_a_forged_header_are_refused(header: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(WeightsCorrupt, match=r"of x|header of x|x ends"):
        offsets(tmp_path / "x", header)


@pytest.mark.parametrize("header", ["text", [1], None, 3])
def test_offsets_of_a_header_that_is_no_table_are_refused(header: Any, tmp_path: Path) -> None:
    with pytest.raises(WeightsCorrupt, match="header of x cannot be read"):
        offsets(tmp_path / "x", header)


@pytest.mark.parametrize("length", [2**63, 10_000, 47])
def test_offsets_of_a_header_with_another_length_are_refused(length: int, tmp_path: Path) -> None:
    with pytest.raises(WeightsCorrupt):
        offsets(tmp_path / "x", {"a": entry("F32", [4], 0, 16)}, length=length)


@pytest.mark.parametrize("data", [b"", b"1234567", b"<html>not found</html>", b"\xff" * 64, b"\0" * 64])
def test_offsets_of_what_is_no_safetensors_file_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    with (tmp_path / "x").open("rb") as stream, pytest.raises(WeightsCorrupt):
        read_offsets(stream)


def test_offsets_that_a_broken_disk_keeps_are_refused(tmp_path: Path) -> None:
    class Broken(io.FileIO):
        def read(self, _size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    written(tmp_path / "x")
    with Broken(tmp_path / "x") as stream, pytest.raises(WeightsCorrupt, match="header of x cannot be read"):
        read_offsets(cast(BinaryIO, stream))


def test_offsets_of_a_deep_header_are_refused(tmp_path: Path) -> None:
    text = b"[" * 100_000
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text)
    with (tmp_path / "x").open("rb") as stream, pytest.raises(WeightsCorrupt, match="header"):
        read_offsets(stream)
