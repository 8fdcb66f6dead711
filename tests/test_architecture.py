"""The rules of the tree, read from the source: who may import whom, who may touch what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = sorted(
    path
    for pattern in ("*.py", "schemas/*.py", "engine/**/*.py", "apps/**/*.py", "builder/*.py")
    for path in ROOT.glob(pattern)
)
LAYER = {"schemas": 0, "engine": 1, "engine.backends": 2, "model_handler": 3, "handler": 4, "apps": 4}
NOT_IN_THE_IMAGE = {"bench", "examples", "tests"}


def imports(source: str, *, top_level: bool) -> set[str]:
    """Modules that a source imports; only those that run at import when `top_level`."""
    tree = ast.parse(source)
    nodes = tree.body if top_level else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def layer(module: str) -> int | None:
    parts = module.split(".")
    for depth in (2, 1):
        if (name := ".".join(parts[:depth])) in LAYER:
            return LAYER[name]
    return None


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def uphill(module: str, source: str) -> list[str]:
    """What `module` imports from above itself, or from what the image does not hold."""
    own = layer(module)
    if own is None:  # download_weights and builder stand outside the request's path
        return []
    others = {other: layer(other) for other in imports(source, top_level=False)}
    return sorted(
        other for other, of in others.items() if (of or 0) > own or other.partition(".")[0] in NOT_IN_THE_IMAGE
    )


@pytest.mark.parametrize("path", PRODUCT, ids=module_of)
def test_imports_run_one_way(path: Path) -> None:
    assert uphill(module_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        ("engine.backends.wan", "import model_handler", ["model_handler"]),
        ("engine.text", "import engine.backends.wan", ["engine.backends.wan"]),
        ("schemas.words", "def f():\n    import engine", ["engine"]),
        ("handler", "import bench.say", ["bench.say"]),
        ("engine.text", "import schemas.errors", []),
    ],
)  # fmt: skip
def test_import_from_above_is_noticed(module: str, line: str, found: list[str]) -> None:
    assert uphill(module, line) == found


BACKEND_FILES = [path for path in PRODUCT if path.parent == ROOT / "engine" / "backends" and path.stem != "__init__"]


def siblings(source: str) -> set[str]:
    """The backends that a backend's source imports."""
    names = {module_of(path) for path in BACKEND_FILES}
    return {
        name for name in names for module in imports(source, top_level=False) if f"{module}.".startswith(f"{name}.")
    }


@pytest.mark.parametrize("path", BACKEND_FILES, ids=module_of)
def test_backends_do_not_import_each_other(path: Path) -> None:
    assert siblings(path.read_text()) == set()


@pytest.mark.parametrize("name", [path.stem for path in BACKEND_FILES])
def test_import_of_any_backend_is_noticed(name: str) -> None:
    assert siblings(f"from engine.backends import {name}") == {f"engine.backends.{name}"}
    assert siblings(f"from engine.backends.{name} import x") == {f"engine.backends.{name}"}


def reads_environment(source: str) -> bool:
    names = {"environ", "environb", "getenv", "getenvb"}
    return any(
        (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names})
        for node in ast.walk(ast.parse(source))
    )


@pytest.mark.parametrize("path", PRODUCT, ids=module_of)
def test_only_settings_reads_the_environment(path: Path) -> None:
    assert not reads_environment(path.read_text()) or path == ROOT / "engine" / "settings.py"


@pytest.mark.parametrize("source", ["import os\nos.getenv('A')", "from os import environ", "import os as o\no.environ"])
def test_reading_the_environment_is_noticed(source: str) -> None:
    assert reads_environment(source)


@pytest.mark.parametrize("path", [p for p in PRODUCT if p.parent != ROOT / "engine" / "backends"], ids=module_of)
def test_heavy_libraries_are_imported_only_by_what_the_engine_computes_with(path: Path) -> None:
    heavy = {m.split(".")[0] for m in imports(path.read_text(), top_level=True)} & {
        "torch",
        "diffusers",
        "transformers",
    }
    assert not heavy or path.is_relative_to(ROOT / "engine"), f"{module_of(path)} imports {heavy} at its top"


LOOP_S = 0.04  # of a million rounds, where the import takes 0.3 s; a slower machine may take longer for both


def test_importing_the_handler_is_light() -> None:
    code = (
        "import sys, time; t = time.process_time(); sum(i % 7 for i in range(10**6)); loop = time.process_time() - t;"
        "t = time.process_time(); import handler; spent = time.process_time() - t;"
        "heavy = {'torch', 'diffusers', 'transformers', 'boto3', 'runpod', 'av'} & set(sys.modules);"
        "print(spent, loop, *sorted(heavy))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    assert [heavy for _, _, *heavy in runs] == [[], [], []]
    # CPU seconds: a crowded machine makes the wall clock prove nothing
    assert min(float(spent) / max(1.0, float(loop) / LOOP_S) for spent, loop, *_ in runs) < 0.5
