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


def imports(path: Path, *, top_level: bool) -> set[str]:
    """Modules that a file imports; only those that run at import when `top_level`."""
    tree = ast.parse(path.read_text())
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


@pytest.mark.parametrize("path", PRODUCT, ids=module_of)
def test_imports_run_one_way(path: Path) -> None:
    own = layer(module_of(path))
    if own is None:  # download_weights and builder stand outside the request's path
        return
    for module in imports(path, top_level=False):
        other = layer(module)
        assert other is None or other <= own, f"{module_of(path)} imports {module}, which is above it"


def test_backends_do_not_import_each_other() -> None:
    for path in (ROOT / "engine" / "backends").glob("*.py"):
        siblings = {m for m in imports(path, top_level=False) if m.startswith("engine.backends.")}
        assert not {m for m in siblings if len(m.split(".")) > 2 and m.split(".")[2] in {"sdxl", "wan", "wan_svi"}}


@pytest.mark.parametrize("path", PRODUCT, ids=module_of)
def test_only_settings_reads_the_environment(path: Path) -> None:
    reads = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
        if isinstance(node.value, ast.Name) and node.value.id == "os"
    ]
    assert not reads or path.name == "settings.py"


@pytest.mark.parametrize("path", [p for p in PRODUCT if p.parent != ROOT / "engine" / "backends"], ids=module_of)
def test_heavy_libraries_are_imported_only_by_what_the_engine_computes_with(path: Path) -> None:
    heavy = {m.split(".")[0] for m in imports(path, top_level=True)} & {"torch", "diffusers", "transformers"}
    assert not heavy or path.is_relative_to(ROOT / "engine"), f"{module_of(path)} imports {heavy} at its top"


@pytest.mark.parametrize("path", PRODUCT, ids=module_of)
def test_dangerous_calls_are_absent(path: Path) -> None:
    forbidden = {"pickle", "torch.load", "load_image", "load_video", "mktemp"}
    names = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert not {n for n in names if n in {"eval", "exec"} or any(n.endswith(f) for f in forbidden)}
    assert not any(
        "shell=True" in ast.unparse(n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)
    )


def test_importing_the_handler_is_light() -> None:
    code = (
        "import sys, time; t = time.process_time(); import handler; spent = time.process_time() - t;"
        "heavy = {'torch', 'diffusers', 'transformers', 'boto3', 'runpod', 'av'} & set(sys.modules);"
        "print(round(spent, 3), sorted(heavy))"
    )
    best = min(
        float(line.split()[0])
        for line in (
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
            for _ in range(3)
        )
        if line.rstrip().endswith("[]") or pytest.fail(f"heavy modules at import: {line}")
    )
    assert best < 0.5  # CPU seconds: a crowded machine makes the wall clock prove nothing
