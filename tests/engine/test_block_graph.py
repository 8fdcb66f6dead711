"""Code compiled in a thread, on tensors without storage, that then runs on the real ones."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from engine.block_graph import BlockGraph
from engine.linear8 import replace_linears
from engine.shadow import describe
from engine.turns import TURN_S
from tests.engine.tiny_wan import make_wan, wan_inputs

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.widen = nn.Linear(8, 16).requires_grad_(False)
        self.register_buffer("shift", torch.randn(16))

    def forward(self, x: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return functional.gelu(self.widen(x) + self.shift) * pair[0] - pair[1]


def arguments(seed: int = 0) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(seed)
    return torch.randn(4, 8), (torch.randn(4, 16), torch.randn(4, 16))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def compiled(block: nn.Module, backend="eager") -> BlockGraph:
    graph = BlockGraph(type(block).forward, backend, block, describe(arguments()), CPU)
    graph.join()
    return graph


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.inference_mode()
def test_code_runs_on_every_block_and_argument_of_the_shapes_it_was_made_for(backend):
    first, second = Block(1), Block(2)
    graph = compiled(first, backend)
    assert graph.problem is None
    for block, args in ((first, arguments(3)), (second, arguments(4))):
        assert torch.equal(graph(block, args), block(*args))
    first.shift = torch.zeros(16)  # another tensor object: read when the block is called
    assert torch.equal(graph(first, arguments(3)), first(*arguments(3)))


def test_compiler_sees_no_storage_and_runs_nothing():
    kinds, runs = [], []

    def backend(graph, inputs):
        kinds.extend(type(x).__name__ for x in inputs)
        return lambda *args: runs.append(1) or graph.forward(*args)

    graph = compiled(Block(1), backend)
    assert graph.is_ready
    assert set(kinds) == {"FakeTensor"}
    assert runs == []
    graph(Block(1), arguments())
    assert runs == [1]


class Holder(Block):
    """Keeps a tensor where no name leads to it: its code would carry it to every other block."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.hidden = [torch.randn(16)]

    def forward(self, x, pair):
        return super().forward(x, pair) + self.hidden[0]


class Two(Block):
    def forward(self, x, pair):
        return super().forward(x, pair), pair[0] + 1


@pytest.mark.parametrize("kind", [Holder, Two])
def test_block_whose_code_would_not_fit_the_others_is_refused(kind):
    graph = compiled(kind(1))
    assert graph.problem is not None
    assert not graph.is_ready


def test_threads_take_short_turns_only_while_something_is_compiled():
    before, seen = sys.getswitchinterval(), []

    def backend(graph, inputs):
        seen.append(sys.getswitchinterval())
        return graph.forward

    compiled(Block(1), backend)
    assert seen == [pytest.approx(TURN_S)]
    assert sys.getswitchinterval() == before


@pytest.mark.soak
@pytest.mark.timeout(300)
@torch.inference_mode()
def test_real_compiler_in_the_thread_computes_what_the_eager_block_does():
    """Inductor (C++ here), 8-bit layers, two experts' blocks."""
    models = [make_wan(seed, layers=1) for seed in (0, 1)]
    given = []
    for model in models:
        replace_linears(model, "fp8")
        model.blocks[0].register_forward_pre_hook(lambda _block, args: given.append(args))
        model(**wan_inputs())
    eager = type(models[0].blocks[0]).forward
    graph = BlockGraph(eager, "inductor", models[0].blocks[0], describe(given[0]), CPU)
    graph.join()
    assert graph.problem is None
    for model, args in zip(models, given, strict=True):
        expected = eager(model.blocks[0], *args)
        # The order of sums differs; a value at the edge between two 8-bit numbers may fall to either side.
        assert (graph(model.blocks[0], args) - expected).norm() < 0.01 * expected.norm()


PROCESS = """
import sys, torch
from pathlib import Path
from engine.artefacts import Artefacts
from engine.compiling import CompiledBlocks
from tests.engine.tiny_wan import make_wan, wan_inputs
model = make_wan(0, layers=1)
blocks = CompiledBlocks([model], Artefacts(Path(sys.argv[1]), "test"), patience_s=300.0)
with torch.inference_mode():
    model(**wan_inputs())
hits = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
print(hits, blocks.ready, blocks.save(), blocks.notes)
"""


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_second_process_finds_what_the_first_compiled_and_writes_nothing(tmp_path):
    said = []
    for cache in ("first", "second"):
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / cache), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, str(tmp_path / "kept")],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        said.append(done.stdout.strip())
    assert said == ["0 1 True []", "1 1 False []"]
