"""What the bake keeps of a tokenizer cuts text exactly as its library's own, and is used for nothing else."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer

from engine.profile import Component
from engine.profiles import PROFILES
from engine.settings import Settings
from engine.tokenizer import READY, make_ready, read_ready
from engine.weights import MANIFEST, locate

UMT5 = PROFILES["wan22_i2v_svi"].component("tokenizer")
TEXTS = (
    "", "a red fox runs slowly in the snow", "  a\tred \n fox ", "soooooo aaaaaaaaaa 1111111", "狐 🦊 ½ ａｂｃ",
    "a <extra_id_0> fox </s> <pad> runs <unk>", "fox " * 600,
)  # fmt: skip


@pytest.fixture
def folder(upstream: Path, tmp_path: Path) -> Path:
    return copied(UMT5, upstream, tmp_path)


def copied(component: Component, upstream: Path, tmp_path: Path) -> Path:
    """A published tokenizer that a test may change."""
    source = upstream / component.source.repo / component.subfolder
    return Path(shutil.copytree(source, tmp_path / component.name))


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    stored = json.loads(path.read_bytes())
    edit(stored)
    path.write_text(json.dumps(stored))


def by_library(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def pieces(tokenizer: Any) -> Any:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]


def with_crooked_scores(stored: dict[str, Any]) -> None:
    """Scores of as many digits as a double has, and sentinels that stand at the end of the vocabulary as UMT5's do."""
    draw = random.Random(0)
    vocabulary = [*stored["model"]["vocab"], *([f"<extra_id_{i}>", 0.0] for i in range(2))]
    stored["model"]["vocab"] = [*vocabulary[:3], *([piece, -20 * draw.random()] for piece, _ in vocabulary[3:])]
    line = {**stored["added_tokens"][-1], "content": "<extra_id_0>", "id": len(vocabulary) - 2}
    word = {**line, "content": "<extra_id_1>", "id": len(vocabulary) - 1, "special": False, "normalized": True}
    stored["added_tokens"] += [line, word]


@pytest.mark.parametrize("edit", [lambda _: None, with_crooked_scores], ids=["twin", "crooked"])
def test_ready_tokenizer_cuts_as_the_librarys_own(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    change(folder / "tokenizer.json", edit)
    make_ready(folder)
    ours, theirs = read_ready(folder), by_library(folder)
    assert ours is not None
    assert pieces(ours) == pieces(theirs)  # to the last digit
    for text in TEXTS:
        mine, other = (
            one(text, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
            for one in (ours, theirs)
        )
        assert {name: rows.tolist() for name, rows in mine.items()} == {
            name: rows.tolist() for name, rows in other.items()
        }
        assert ours(text, verbose=False).input_ids == theirs(text, verbose=False).input_ids
    assert (len(ours), ours.model_max_length) == (len(theirs), theirs.model_max_length)


def test_ready_tokenizer_pads_and_cuts_off_on_the_side_of_the_librarys_own(folder: Path) -> None:
    own = {"padding_side": "left", "truncation_side": "left", "model_input_names": ["input_ids"]}
    change(folder / "tokenizer_config.json", lambda stored: stored.update(own))
    make_ready(folder)
    ours = read_ready(folder)
    assert ours is not None
    for text in TEXTS:
        mine, other = (
            one(text, padding="max_length", max_length=8, truncation=True) for one in (ours, by_library(folder))
        )
        assert dict(mine) == dict(other)


def test_scores_would_lose_their_last_digit_if_tokenizers_read_them(folder: Path) -> None:
    """The reason for building the model from numbers that Python has read."""
    change(folder / "tokenizer.json", with_crooked_scores)
    exact = pieces(by_library(folder))
    reread = tokenizers.Tokenizer.from_str(by_library(folder).backend_tokenizer.to_str())
    assert json.loads(reread.to_str())["model"]["vocab"] != exact


def test_load_takes_what_the_bake_kept_and_asks_the_library_for_nothing(
    twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(twins, tmp_path / "twins"))
    make_ready(root / UMT5.folder)
    parts = locate(PROFILES["wan22_i2v_svi"], Settings(weights_dir=root)).parts()
    monkeypatch.delattr(AutoTokenizer, "from_pretrained")
    assert parts.load("tokenizer")("a red fox").input_ids[-1] == 1


def test_older_bake_that_kept_nothing_is_loaded_as_ever(
    twins: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(shutil.copytree(twins, tmp_path / "twins"))
    profile = PROFILES["wan22_i2v_svi"]
    (root / UMT5.folder / READY).unlink()
    change(
        root / profile.folder / MANIFEST,
        lambda stored: stored.update(files=[line for line in stored["files"] if Path(line["path"]).name != READY]),
    )
    parts = locate(profile, Settings(weights_dir=root)).parts()
    assert type(parts.load("tokenizer")) is type(by_library(root / UMT5.folder))
    assert "made anew" not in caplog.text


@pytest.mark.parametrize("name", ["transformers", "tokenizers"])
def test_what_was_kept_for_another_version_is_not_used(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make_ready(folder)
    change(folder / READY, lambda ready: ready["made_by"].update({name: "0"}))
    with caplog.at_level("INFO"):
        assert read_ready(folder) is None
    assert "made anew, for it was baked with other versions" in caplog.text


@pytest.mark.parametrize(
    "edit", [lambda ready: ready.pop("made_by"), lambda ready: ready["tokenizer"]["model"].update(unk_id=10**6)]
)
def test_what_cannot_be_read_is_said_and_made_anew(
    folder: Path, edit: Callable[[dict[str, Any]], None], caplog: pytest.LogCaptureFixture
) -> None:
    make_ready(folder)
    change(folder / READY, edit)
    assert read_ready(folder) is None
    assert "what the bake kept cannot be read" in caplog.text


def test_tokenizer_of_another_kind_is_not_kept(
    upstream: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(PROFILES["sdxl"].component("tokenizer"), upstream, tmp_path)
    make_ready(folder)
    assert not (folder / READY).exists()
    assert "not kept ready" in caplog.text


def test_tokenizer_that_would_be_read_back_as_another_is_not_kept(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What pads stands far behind the pieces that it is begun with, and would get another number."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        change(folder / name, lambda stored: stored.update(pad_token="▁fox"))
    make_ready(folder)
    assert not (folder / READY).exists()
    assert "it would be read back as another" in caplog.text
