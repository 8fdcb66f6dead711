"""The image's recipe and RunPod's hub files, as far as they can be held without building an image."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import packages_distributions, requires
from importlib.util import cache_from_source
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pytest

from engine.profiles import BAKES, PROFILES, resolve
from engine.settings import IMAGE_KERNELS, ROOT, Settings
from engine.twins import write_upstream
from schemas.input_schema import parse_request
from tests.soak.footprint import ALLOCATOR


class Step(NamedTuple):
    """One instruction of the Dockerfile. `stage`: the name of the build stage it belongs to."""

    stage: str
    name: str
    words: list[str]

    @property
    def sources(self) -> list[str]:
        """What a COPY from the build's own folder copies."""
        paths = [word for word in self.words if not word.startswith("--")]
        return paths[:-1] if not any(word.startswith("--from=") for word in self.words) else []


@cache
def dockerfile() -> tuple[Step, ...]:
    text = (ROOT / "Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    steps, stage = [], ""
    for line in filter(None, map(str.strip, lines.splitlines())):
        name, _, rest = line.partition(" ")
        words = rest.split() if rest.startswith("[") else shlex.split(rest)
        stage = words[-1] if name == "FROM" else stage
        steps.append(Step(stage, name, words))
    return tuple(steps)


def steps(name: str, stage: str | None = None) -> list[Step]:
    return [step for step in dockerfile() if step.name == name and stage in (None, step.stage)]


def environment(stage: str) -> dict[str, str]:
    return dict(word.split("=", 1) for step in steps("ENV", stage) for word in step.words)


def found(source: str) -> list[Path]:
    """The files that a COPY source stands for."""
    matches = [ROOT] if source == "." else sorted(ROOT.glob(source))
    return [path for match in matches for path in ([match] if match.is_file() else match.rglob("*")) if path.is_file()]


def is_sent(path: Path, rules: str | None = None) -> bool:
    """Whether .dockerignore lets a file into the build. The last rule that matches it or a folder above it counts."""
    relative = PurePosixPath(path.relative_to(ROOT).as_posix())
    parts = [relative, *relative.parents][:-1]
    sent = True
    for rule in ((ROOT / ".dockerignore").read_text() if rules is None else rules).split():
        pattern = rule.removeprefix("!")
        if any(_matches(part, pattern) for part in parts):
            sent = rule.startswith("!")
    return sent


def _matches(path: PurePosixPath, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatchcase(path.name, pattern.removeprefix("**/"))
    names = pattern.split("/")
    return len(names) == len(path.parts) and all(map(fnmatchcase, path.parts, names))


@pytest.fixture
def weights_stage(tmp_path: Path) -> Path:
    """A folder with exactly the files that the weights stage has before it bakes."""
    for step in steps("COPY", "weights"):
        for file in (file for source in step.sources for file in found(source) if is_sent(file)):
            target = tmp_path / "worker" / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return tmp_path / "worker"


def in_stage(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder`, with nothing of this project around it."""
    bare = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=bare, capture_output=True, text=True)


def test_weights_are_baked_before_the_code_comes_in() -> None:
    order = [(step.stage, step.name, step.words) for step in dockerfile()]
    bake = next(i for i, (_, name, words) in enumerate(order) if name == "RUN" and "download_weights.py" in words)
    weights = order.index(("worker", "COPY", ["--from=weights", "/worker/weights", "weights"]))
    code = order.index(("worker", "COPY", [".", "."]))
    assert bake < weights < code
    before = {file.name for step in dockerfile()[:bake] for source in step.sources for file in found(source)}
    assert not before & {"handler.py", "model_handler.py", "input_schema.py", "wan_svi.py"}


def test_packages_are_installed_before_anything_else_is_copied() -> None:
    copies = [step.sources for step in steps("COPY", "base")]
    assert copies == [["builder/requirements.lock"]]
    install = steps("RUN", "base")[-1].words
    assert (install[:2], install[-2:]) == (["pip", "install"], ["-r", "builder/requirements.lock"])


def test_every_copied_path_exists_and_is_let_through() -> None:
    for step in steps("COPY"):
        for source in step.sources:
            files = found(source)
            assert files or source == "builder/weights.lock.jso[n]", f"COPY {source}: no such file"
            assert [
                file for file in files if source != "." and "__pycache__" not in file.parts and not is_sent(file)
            ] == []


def test_dockerignore_lets_in_what_the_worker_runs_on() -> None:
    needed = [ROOT / name for name in ("handler.py", "model_handler.py", "download_weights.py", "test_input.json")]
    needed += [path for folder in ("schemas", "engine", "apps") for path in (ROOT / folder).rglob("*.py")]
    needed += (ROOT / "engine" / "published").glob("*.json")
    assert [path for path in needed if not is_sent(path)] == []


@pytest.mark.parametrize(
    "path", [".git/config", ".env", "weights/tiny/sdxl/x", "output/a.mp4", ".venv/bin/python", "tests/zoo.py",
             "engine/__pycache__/lora.cpython-311.pyc", "engine/backends/__pycache__/wan.cpython-311.pyc"]
)  # fmt: skip
def test_dockerignore_keeps_out_the_rest(path: str) -> None:
    assert not is_sent(ROOT / path)


def test_dockerignore_is_read_as_docker_reads_it() -> None:
    rules = "*\n!engine\n**/__pycache__\n!a.py"
    assert is_sent(ROOT / "engine/backends/wan.py", rules)
    assert is_sent(ROOT / "a.py", rules)
    assert not is_sent(ROOT / "engine/backends/__pycache__/wan.pyc", rules)
    assert not is_sent(ROOT / "docs/a.py", rules)


def test_weights_stage_can_say_what_it_would_fetch(weights_stage: Path) -> None:
    done = in_stage(weights_stage, "download_weights.py", "--dry-run", "--profiles", "sdxl")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.sub(" +", " ", done.stdout).startswith("sdxl 11.5 GB")


def test_dry_run_notices_a_file_that_is_not_copied(weights_stage: Path) -> None:
    (weights_stage / "engine" / "profiles_sdxl.py").unlink()
    assert in_stage(weights_stage, "download_weights.py", "--dry-run", "--profiles", "sdxl").returncode == 1


REPORT = (
    "import pathlib, sys\n"
    "sys.path.insert(0, '.')\n"
    "import download_weights\n"
    "from engine.bake import bake\n"
    "from engine.hub import FolderHub\n"
    "from engine.profiles import BAKES, PROFILES\n"
    "from engine.published import published_values\n"
    "here = pathlib.Path.cwd()\n"
    "{work}\n"
    "files = [pathlib.Path(m.__file__) for m in list(sys.modules.values()) if getattr(m, '__file__', None)]\n"
    "print(*sorted(f.relative_to(here).as_posix() for f in files if f.is_file() and f.is_relative_to(here)))\n"
)
"""Runs `work` in the weights stage's folder, then names every module of that folder that was loaded."""


def copied_modules(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))


def test_weights_stage_holds_every_module_of_the_bake_and_no_other(weights_stage: Path) -> None:
    work = "[published_values(part) for name in BAKES for part in PROFILES[name].components if part.published]"
    done = in_stage(weights_stage, "-c", REPORT.format(work=work))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == copied_modules(weights_stage)


@pytest.mark.soak
@pytest.mark.parametrize("name", BAKES)
def test_weights_stage_bakes(name: str, weights_stage: Path, tmp_path: Path) -> None:
    upstream = tmp_path / "upstream"
    write_upstream(PROFILES[name], upstream)
    work = f"bake(PROFILES[{name!r}], FolderHub(pathlib.Path({str(upstream)!r})), here / 'weights', twin=True)"
    done = in_stage(weights_stage, "-c", REPORT.format(work=work))
    assert done.returncode == 0, done.stderr
    assert (weights_stage / "weights" / name / "manifest.json").is_file()
    assert done.stdout.split() == copied_modules(weights_stage)


def test_image_holds_the_bytecode_of_every_module_that_the_worker_runs(tmp_path: Path) -> None:
    run = [file for source in ("*.py", "apps", "engine", "schemas") for file in found(source) if file.suffix == ".py"]
    for file in run:
        target = tmp_path / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    (compiling,) = [step for step in steps("RUN", "worker") if "compileall" in step.words]
    assert dockerfile().index(compiling) > dockerfile().index(Step("worker", "COPY", [".", "."]))
    bare = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment("base")}
    subprocess.run(["sh", "-c", " ".join(compiling.words)], cwd=tmp_path, env=bare, check=True)
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.pyc")}
    assert written == {Path(cache_from_source(file.relative_to(ROOT))) for file in run}


def test_kernels_are_compiled_from_the_code_that_runs_and_where_no_mount_hides_them() -> None:
    (compiling,) = [step for step in steps("RUN", "worker") if "builder/compile_kernels.py" in step.words]
    assert dockerfile().index(compiling) > dockerfile().index(Step("worker", "COPY", [".", "."]))
    assert compiling.words[2:] == ["--output", str(IMAGE_KERNELS.relative_to(ROOT))]
    made_to_be_written = next(step.words for step in steps("RUN", "worker") if "mkdir" in step.words)
    assert IMAGE_KERNELS.name not in made_to_be_written


def test_worker_is_offline_quiet_and_its_memory_can_grow() -> None:
    expected = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "RUNPOD_LOG_LEVEL": "INFO",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    assert expected.items() <= environment("worker").items()


def test_weights_stage_is_online() -> None:
    for stage in ("base", "weights"):
        assert not [name for name in environment(stage) if "OFFLINE" in name]


def test_images_own_variables_are_settings() -> None:
    settings = Settings.from_env(environment("worker"))
    assert settings.cache_dir == ROOT / "cache"


def test_worker_runs_as_nobody_special_under_a_reaper() -> None:
    last = [step for step in dockerfile() if step.stage == "worker"]
    assert [step.words for step in last if step.name == "ARG"] == [["UID=10001"]]
    user = next(i for i, step in enumerate(last) if step.name == "USER")
    assert last[user].words == ["${UID}"]
    assert not [step for step in last[user:] if step.name in ("RUN", "COPY")]
    assert (last[-1].name, json.loads(" ".join(last[-1].words))) == (
        "ENTRYPOINT",
        ["tini", "--", "python", "handler.py"],
    )
    assert "tini" in steps("RUN", "base")[0].words


def test_token_is_a_mounted_secret_and_nothing_else() -> None:
    named = [step for step in dockerfile() if any("TOKEN" in word for word in step.words)]
    assert [step.name for step in named] == ["RUN"]
    assert named[0].words[0] == "--mount=type=secret,id=HF_TOKEN,env=HF_TOKEN"
    head = (ROOT / "Dockerfile").read_text().splitlines()[0]
    syntax = re.fullmatch(r"# syntax=docker/dockerfile:1\.(\d+)", head)
    assert syntax is not None
    assert int(syntax[1]) >= 10  # the first that knows env= in a secret's mount


def test_precision_is_an_argument_of_the_build_and_reaches_the_bake() -> None:
    assert ["PRECISION=bf16"] in [step.words for step in steps("ARG", "weights")]
    bake = next(step.words for step in steps("RUN", "weights") if "download_weights.py" in step.words)
    assert bake[bake.index("--precision") + 1] == "${PRECISION}"


def test_profiles_of_the_default_build_exist() -> None:
    (argument,) = [word for step in steps("ARG", "weights") for word in step.words if word.startswith("PROFILES=")]
    assert set(argument.removeprefix("PROFILES=").split(",")) <= set(BAKES)


def hub_file(name: str) -> Any:
    return json.loads((ROOT / ".runpod" / name).read_text())


def test_hub_listing_has_what_the_hub_asks_for() -> None:
    hub = hub_file("hub.json")
    assert {"title", "description", "type", "category", "config"} <= hub.keys()
    assert (hub["type"], hub["category"]) == ("serverless", "video")
    assert (hub["config"]["runsOn"], hub["config"]["gpuCount"]) == ("GPU", 1)
    assert hub["config"]["gpuIds"].split(",") == ["ADA_48_PRO", "AMPERE_48"]
    assert hub["config"]["containerDiskInGb"] >= 100  # 80 GB of image, 20 to work in


def test_hub_variables_are_settings_and_their_defaults_let_the_worker_start() -> None:
    variables = {one["key"]: one["input"] for one in hub_file("hub.json")["config"]["env"]}
    assert variables.keys() <= {one.metadata["variable"] for one in fields(Settings)}
    assert all({"name", "type", "description"} <= given.keys() for given in variables.values())
    assert not Settings.from_env({key: given["default"] for key, given in variables.items()}).has_bucket


def test_hub_tests_are_requests_of_the_default_image() -> None:
    tests = hub_file("tests.json")
    baked = next(word for step in steps("ARG", "weights") for word in step.words if word.startswith("PROFILES="))
    assert tests["tests"]
    for one in tests["tests"]:
        assert resolve(parse_request(one["input"])).folder in baked.removeprefix("PROFILES=").split(",")
        assert one["timeout"] >= 300_000  # ms; a cold start reads 12 GB
    assert tests["config"]["allowedCudaVersions"] == hub_file("hub.json")["config"]["allowedCudaVersions"]


def pins() -> dict[str, str]:
    """Package -> version, as builder/requirements.txt has it."""
    lines = (ROOT / "builder" / "requirements.txt").read_text().splitlines()
    found = [line.partition("==") for line in lines if line and not line.startswith("#")]
    assert len({name for name, _, _ in found}) == len(found), "a package is listed twice"
    return {name: pin for name, _, pin in found}


def test_every_requirement_is_pinned_to_one_version() -> None:
    assert [name for name, pin in pins().items() if not re.fullmatch(r"\d+(\.\d+)+", pin)] == []


def test_worker_allocates_as_it_did_in_the_soak() -> None:
    assert environment("worker").items() >= ALLOCATOR.items()


def test_every_import_of_the_worker_is_pinned_or_needed_by_something_pinned() -> None:
    files = [ROOT / "handler.py", ROOT / "model_handler.py", ROOT / "download_weights.py"]
    files += [path for folder in ("schemas", "engine", "apps") for path in (ROOT / folder).rglob("*.py")]
    modules = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    owners = packages_distributions()
    foreign = {owners[name][0].lower() for name in modules - set(sys.stdlib_module_names) if name in owners}
    needed = {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() for name in pins() for line in requires(name) or ()}
    normal = {name.lower().replace("-", "_") for name in {*pins(), *needed}}
    assert sorted(name for name in foreign if name.replace("-", "_") not in normal) == []
