"""What libraries look up as they are imported is looked up once, and they find what they would have found."""

import functools
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import answers
from engine.answers import no_other_process, packages, packages_by_name, whole_caches
from tests.conftest import ROOT
from tests.engine.test_hidden import BACKENDS, PACKAGES, printed

NO_LONG_WAY = """
import importlib.metadata

def packages_distributions():
    raise AssertionError("every file of every distribution was looked for")

importlib.metadata.packages_distributions = packages_distributions
"""

TOLD = f"""
import inspect, json
import diffusers.utils.import_utils, transformers.utils.import_utils

def needs(ask):
    return any(each.default is each.empty for each in inspect.signature(ask).parameters.values())

def told(module):
    names = [name for name in dir(module) if name.startswith("is_") and name.endswith("_available")]
    asked = {{name: getattr(module, name) for name in names if name.split("_")[1] not in {PACKAGES}}}
    return {{name: bool(ask()) for name, ask in asked.items() if not needs(ask)}}

print(json.dumps([told(diffusers.utils.import_utils), told(transformers.utils.import_utils)]))
"""

KEPT_IN = """
from pathlib import Path
import engine.answers
engine.answers.IMAGE_KERNELS = Path({!r})
"""

SHARED = "print(*({'sympy', 'torch.distributed.tensor'} & set(sys.modules)))"

SEARCHED = """
import os
seen, own = [], os.scandir

def scandir(path="."):
    if "/transformers/models/" in str(path):
        seen.append(str(path))
    return own(path)

os.scandir = scandir
"""

MODELS = """
import transformers.models
from transformers.utils.import_utils import create_import_structure_from_path, define_import_structure

folders = create_import_structure_from_path.cache_info()
found = define_import_structure(transformers.models.__file__)
print(sorted((sorted(needed), sorted((file, sorted(names)) for file, names in files.items()))
             for needed, files in found.items()))
print(folders.hits, folders.misses - folders.currsize)
"""


def test_libraries_are_told_the_same_as_without() -> None:
    ours, plain = (json.loads(printed(*before, TOLD, args=("sdxl",))) for before in ((BACKENDS,), ()))
    assert sum(any(told.values()) for told in ours) == 2
    assert plain[1].pop("is_torch_distributed_available") and not ours[1].pop("is_torch_distributed_available")
    assert ours == plain


@pytest.fixture(scope="module")
def plain() -> list[str]:
    """What MODELS finds without any of this."""
    return printed(MODELS).splitlines()


def test_models_are_looked_for_once_and_found_as_without(plain: list[str], tmp_path: Path) -> None:
    ours = printed(KEPT_IN.format(str(tmp_path)), BACKENDS, MODELS, args=("wan22_i2v_svi",)).splitlines()
    assert ours[0] == plain[0]
    hits, forgotten = map(int, ours[1].split())
    assert (hits > 500, forgotten) == (True, 0)
    assert int(plain[1].split()[1]) > 0, "transformers remembers them by itself: whole_caches can go"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an image holds of the models."""
    folder = tmp_path_factory.mktemp("image")
    command = [sys.executable, "builder/list_models.py", "--output", folder]
    (path,) = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return Path(path)


@pytest.mark.parametrize("knows_models", [True, False])
def test_no_library_goes_through_the_files_of_distributions(knows_models: bool, kept: Path, tmp_path: Path) -> None:
    here = KEPT_IN.format(str(kept.parent if knows_models else tmp_path))
    shared = printed(here, NO_LONG_WAY, BACKENDS, SHARED, args=("wan22_i2v_svi", "sdxl"))
    assert shared.split() == [], "nor is what shares a model imported"


def test_image_knows_the_models_and_nobody_looks_for_them(plain: list[str], kept: Path) -> None:
    here = KEPT_IN.format(str(kept.parent))
    assert printed(here, BACKENDS, MODELS, args=("wan22_i2v_svi",)).splitlines()[0] == plain[0]
    assert int(printed(here, SEARCHED, BACKENDS, "print(len(seen))", args=("sdxl",))) < 20, "its models' own folders"


@pytest.mark.parametrize("content", [None, "", "[half of it", "3", '["/here", [[{}, 1]]]'])
def test_what_an_image_holds_is_not_believed_where_it_is_damaged(
    content: str | None, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "IMAGE_KERNELS", tmp_path)
    if content is not None:
        (tmp_path / kept.name).write_text(content)
    assert answers._knowing(len) is len


def test_what_an_image_holds_of_another_place_answers_for_that_alone(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "IMAGE_KERNELS", tmp_path)
    (tmp_path / kept.name).write_text('["/here", [[{"names": ["torch"]}, [["a", {"names": ["B", "C"]}]]]]]')
    known = answers._knowing(len)
    assert known("/here") == known("/here/__init__.py") == {frozenset(["torch"]): {"a": {"B", "C"}}}
    assert known("/there") == len("/there")


def test_package_is_found_by_what_is_declared_or_by_the_distributions_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, declared in (("pillow-1.0", "PIL\n_pil\n"), ("kornia_rs-2.0", None), ("other_pil-3.0", "PIL\n")):
        (tmp_path / f"{folder}.dist-info").mkdir()
        if declared is not None:
            (tmp_path / f"{folder}.dist-info" / "top_level.txt").write_text(declared)
    monkeypatch.setattr("sys.path", [str(tmp_path), str(tmp_path), str(tmp_path / "not_there")])
    found = packages()
    assert {package: sorted(names) for package, names in found.items()} == {
        "PIL": ["other_pil", "pillow"],
        "_pil": ["pillow"],
        "kornia_rs": ["kornia_rs"],
    }


def test_python_answers_for_itself_again_after_the_block() -> None:
    own = importlib.metadata.packages_distributions, functools.lru_cache
    with pytest.raises(ZeroDivisionError), packages_by_name(), whole_caches():
        assert importlib.metadata.packages_distributions is packages
        assert functools.lru_cache is not own[1]
        raise ZeroDivisionError
    assert (importlib.metadata.packages_distributions, functools.lru_cache) == own


def test_torch_can_share_a_model_again_after_the_block() -> None:
    own = torch.distributed.is_available()
    with pytest.raises(ZeroDivisionError), no_other_process():
        assert not torch.distributed.is_available()
        raise ZeroDivisionError
    assert (own, torch.distributed.is_available()) == (True, True)


def test_cache_with_a_size_of_its_own_keeps_it() -> None:
    def same(x: int) -> int:
        return x

    with whole_caches():
        made: list[Any] = [
            functools.lru_cache(same),
            functools.lru_cache(3)(same),
            functools.lru_cache(maxsize=3)(same),
            functools.lru_cache()(same),
        ]
    assert [each.cache_parameters()["maxsize"] for each in made] == [None, 3, 3, 128]
