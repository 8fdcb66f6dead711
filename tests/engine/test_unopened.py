"""A package that nobody asks for anything is not run; who does ask finds all of it, whatever came before."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.unopened import MODELS, Unopened, leave_unopened
from tests.engine.test_hidden import BACKENDS, printed

UNOPENED = """
print(*(name for name, module in sys.modules.items() if type(module).__name__ == "Unopened"))
print("torch._dynamo" in sys.modules)
"""

OPENED = """
import diffusers
import diffusers.models.transformers as transformers

held = transformers
assert diffusers.WanTransformer3DModel is transformers.WanTransformer3DModel
from diffusers.models.transformers import FluxTransformer2DModel
assert diffusers.FluxTransformer2DModel is FluxTransformer2DModel is held.FluxTransformer2DModel
"""

COMPILED = """
import torch

compiled = torch.compile(lambda x: 2 * x + 1, backend="eager", fullgraph=True)
assert compiled(torch.ones(2)).tolist() == [3.0, 3.0]
assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
assert torch.compiler.disable(len) is not len, "marks are for the import of libraries alone"
"""

HELD = """
import torch
from engine.unopened import compiler_unopened

with compiler_unopened():
    import torch._dynamo as held
    assert held.disable(len) is len and torch.compiler.disable(len) is len
assert held.disable(len) is not len and held.config is torch._dynamo.config
"""

JOB = """
from pathlib import Path
from bench.jobs import JOBS
from engine.progress import Progress
from engine.settings import Settings
from handler import Worker, run
from model_handler import ModelHandler

weights, output = map(Path, sys.argv[1:])
settings = Settings(weights_dir=weights, output_dir=output, outbox_dir=output / "outbox")
job = JOBS["svi_endframe"]
run(job.whole(0, job.small), job_id="one", worker=Worker(settings, ModelHandler(settings)), progress=Progress())
"""

OPERATORS = """
import torch
from engine import rounding, text_attention

x = torch.randn(4, 16).bfloat16()
rounding.plain_round(x)
text_attention.attend_text(x[None, :, None], x[None, :, None], x[None, :, None])
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One that counts how often its own code runs, and takes its time; with a module that is its own."""
    folder = tmp_path / "slow_package"
    folder.mkdir()
    code = "import time; ran = globals().get('ran', 0) + 1; time.sleep(0.1); late = 7; from . import part; late = 8"
    (folder / "__init__.py").write_text(code.replace("; ", "\n"))
    (folder / "part.py").write_text("here = 3")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] in ("slow_package", "outer_package")]:
        del sys.modules[name]


def test_first_job_imports_neither_other_models_nor_the_compiler(twins: Path, tmp_path: Path) -> None:
    assert set(printed(JOB, UNOPENED, args=(str(twins), str(tmp_path))).split()) == {*MODELS, "False"}


def test_operators_are_called_without_the_compiler_and_who_wants_another_model_finds_it() -> None:
    said = printed(BACKENDS, OPERATORS, UNOPENED, "print('then')", OPENED, UNOPENED, args=("wan22_i2v_svi",))
    before, _, after = said.partition("then")
    assert set(before.split()) == {*MODELS, "False"}
    assert MODELS[1] not in after.split()


def test_who_compiles_finds_the_compiler_whole() -> None:
    before = "from torch._dynamo.utils import counters"  # a module of it first
    assert set(printed(BACKENDS, before, COMPILED, UNOPENED, args=("wan22_i2v_svi",)).split()) == {*MODELS, "True"}


def test_who_holds_the_stand_in_is_answered_by_the_compiler_afterwards() -> None:
    printed(HELD)


def test_package_is_run_when_it_is_asked_and_once(package: Path) -> None:
    leave_unopened("slow_package")
    held = sys.modules["slow_package"]
    from slow_package.part import here

    assert (here, type(sys.modules["slow_package"])) == (3, Unopened)
    assert (held.late, held.ran, sys.modules["slow_package"].ran) == (8, 1, 1)
    assert type(sys.modules["slow_package"]) is not Unopened
    leave_unopened("slow_package", "nobody_has_such_a_package")
    assert type(sys.modules["slow_package"]) is not Unopened, "what is imported stays"
    with pytest.raises(AttributeError, match="never"):
        _ = held.never


def test_threads_that_ask_at_once_find_the_same_whole_package(package: Path) -> None:
    leave_unopened("slow_package")
    held, seen = sys.modules["slow_package"], list[tuple[int, int]]()
    threads = [threading.Thread(target=lambda: seen.append((held.late, held.ran))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [(8, 1)] * 8
