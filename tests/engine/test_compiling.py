"""Compiled blocks: how many graphs there are, when they are made, and that nothing waits or breaks because
of them."""

import copy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from engine import attention, compiling
from engine.compiling import Artefacts, CompiledBlocks, graph_count
from engine.experts import RollingExperts
from engine.linear8 import replace_linears
from tests.engine.tiny_wan import make_wan, wan_inputs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


class Warm(Artefacts):
    """As if an earlier process had left its artefacts."""

    def load(self) -> bool:
        return True


def warm(tmp_path) -> Warm:
    return Warm(tmp_path, "test")


def forward(model, height: int = 4) -> torch.Tensor:
    with torch.inference_mode():
        return model(**wan_inputs(height)).sample


def test_one_graph_serves_every_block_of_both_experts_and_the_second_request(tmp_path):
    models = [make_wan(0), make_wan(1)]
    expected = [forward(model) for model in models]
    CompiledBlocks(models, warm(tmp_path), backend="eager")
    assert all(torch.equal(forward(model), out) for model, out in zip(models, expected, strict=True))
    assert graph_count() == 1
    forward(models[0])
    forward(models[1])
    assert graph_count() == 1


def test_each_number_of_tokens_has_one_graph_whatever_the_orientation(tmp_path):
    model = make_wan(0)
    CompiledBlocks([model], warm(tmp_path), backend="eager")
    forward(model, height=4)
    forward(model, height=8)
    assert graph_count() == 2
    wide = wan_inputs(8)
    wide["hidden_states"] = wide["hidden_states"].transpose(3, 4).contiguous()
    with torch.inference_mode():
        model(**wide)
    assert graph_count() == 2


def test_quantised_rolling_experts_keep_their_graph_over_swaps(tmp_path):
    models = {"high": make_wan(0), "low": make_wan(1)}
    for model in models.values():
        replace_linears(model, "fp8")
        attention.install(model, "native")
    expected = {name: forward(model) for name, model in models.items()}
    experts = RollingExperts(copy.deepcopy(models), "cpu")
    CompiledBlocks([experts.model], warm(tmp_path), backend="eager")
    for _ in range(2):
        for name, then in (("high", "low"), ("low", "high")):
            with experts.use(name, forwards=2, then=then) as model:
                assert torch.equal(forward(model), expected[name])
                assert torch.equal(forward(model), expected[name])
    assert graph_count() == 1


def test_hooks_run_around_the_compiled_block(tmp_path):
    model = make_wan(0, layers=2)
    CompiledBlocks([model], warm(tmp_path), backend="eager")
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: seen.append(1))
    forward(model)
    assert len(seen) == 2
    assert graph_count() == 1


def test_hook_inside_a_block_is_not_passed_by(tmp_path):
    model = make_wan(0)
    CompiledBlocks([model], warm(tmp_path), backend="eager")
    compiled = forward(model)
    handle = model.blocks[1].ffn.net[2].register_forward_hook(lambda _module, _inputs, out: out + 1)
    assert not torch.equal(forward(model), compiled)
    handle.remove()
    assert torch.equal(forward(model), compiled)
    assert graph_count() == 1


def test_hook_inside_a_block_starts_no_compilation():
    model = make_wan(0)
    blocks = CompiledBlocks([model], backend="eager")
    for block in model.blocks:
        block.ffn.net[2].register_forward_hook(lambda _module, _inputs, out: out)
    forward(model)
    assert blocks._behind == {}


def test_cold_cache_serves_eagerly_while_it_compiles_behind():
    """The compiler is held until the eager forward is done: if the job waited for it, this would never
    end."""
    model = make_wan(0)
    expected = forward(model)
    may_compile, threads = threading.Event(), set()

    def slow(graph, inputs):
        threads.add(threading.current_thread().name)
        assert may_compile.wait(60)
        return graph.forward

    blocks = CompiledBlocks([model], backend=slow)
    assert torch.equal(forward(model), expected)
    assert blocks._ready == set()
    may_compile.set()
    blocks.wait()
    assert threads == {"compile-behind"}
    assert torch.equal(forward(model), expected)
    assert len(blocks._ready) == 1
    assert threads == {"compile-behind", "MainThread"}
    assert graph_count() == 2  # the one compiled behind, and its adoption


def test_eager_blocks_leave_the_interpreter_to_the_compiler_only_while_it_works(monkeypatch):
    model = make_wan(0, layers=3)
    may_compile, waits = threading.Event(), []
    monkeypatch.setattr(compiling, "_let_others_run", lambda _out: waits.append(1))

    def slow(graph, inputs):
        assert may_compile.wait(60)
        return graph.forward

    blocks = CompiledBlocks([model], backend=slow)
    forward(model)
    assert len(waits) == 3
    may_compile.set()
    blocks.wait()
    forward(model)
    assert len(waits) == 3


def test_thread_compiles_without_running_or_holding_memory():
    model = make_wan(0)
    runs, storages = [], []

    def backend(graph, inputs):
        storages.extend(type(x).__name__ for x in inputs)
        return lambda *args: runs.append(1) or graph.forward(*args)

    blocks = CompiledBlocks([model], backend=backend)
    forward(model)
    blocks.wait()
    assert runs == []
    assert set(storages) == {"FakeTensor"}


def test_compilation_that_was_skipped_behind_is_tried_again():
    model = make_wan(0)
    blocks = CompiledBlocks([model], backend="eager")
    with torch.compiler.set_stance("force_eager"):
        forward(model)
        blocks.wait()
    assert blocks._ready == set()
    forward(model)
    blocks.wait()
    assert len(blocks._ready) == 1
    assert blocks.notes == []


def test_compiler_that_fails_behind_leaves_the_eager_block_and_a_note():
    model = make_wan(0)
    expected = forward(model)

    def broken(graph, inputs):
        raise NotImplementedError("no such instruction")

    blocks = CompiledBlocks([model], backend=broken)
    forward(model)
    blocks.wait()
    assert torch.equal(forward(model), expected)
    assert len(blocks.notes) == 1
    assert "8 tokens" in blocks.notes[0]
    assert "no such instruction" in blocks.notes[0]


def test_compiler_that_fails_in_the_job_leaves_the_eager_block_and_a_note(tmp_path):
    model = make_wan(0)
    expected = forward(model)

    def broken(graph, inputs):
        raise NotImplementedError("no such instruction")

    blocks = CompiledBlocks([model], warm(tmp_path), backend=broken)
    assert torch.equal(forward(model), expected)
    assert torch.equal(forward(model), expected)
    assert len(blocks.notes) == 1


def test_error_of_the_job_itself_is_not_taken_for_the_compilers(tmp_path):
    model = make_wan(0)

    def backend(graph, inputs):
        def out_of_memory(*args):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return out_of_memory

    CompiledBlocks([model], warm(tmp_path), backend=backend)
    with pytest.raises(torch.OutOfMemoryError):
        forward(model)


def test_more_sizes_than_graphs_run_eagerly_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "MAX_GRAPHS", 2)
    model = make_wan(0)
    expected = forward(model, height=12)
    blocks = CompiledBlocks([model], warm(tmp_path), backend="eager")
    for height in (4, 8, 12, 12):
        out = forward(model, height)
    assert torch.equal(out, expected)
    assert graph_count() == 2
    assert blocks.notes == ["blocks run uncompiled for 24 tokens: more than 2 sizes"]


def test_remove_gives_the_blocks_their_own_forward_back(tmp_path):
    model = make_wan(0)
    blocks = CompiledBlocks([model], warm(tmp_path), backend="eager")
    blocks.remove()
    forward(model)
    assert graph_count() == 0
    assert not model._forward_pre_hooks


def test_missing_artefacts_are_a_miss(tmp_path):
    assert Artefacts(tmp_path, "fp8-flash4").load() is False


def test_damaged_artefacts_are_a_miss(tmp_path):
    artefacts = Artefacts(tmp_path, "fp8-flash4")
    artefacts.path.write_bytes(b"not what was saved")
    assert artefacts.load() is False


def test_artefacts_of_another_variant_or_version_are_another_file(tmp_path, monkeypatch):
    path = Artefacts(tmp_path, "fp8-flash4").path
    assert Artefacts(tmp_path, "fp8-flash4").path == path
    assert Artefacts(tmp_path, "bf16-flash4").path != path
    monkeypatch.setattr(compiling, "_version", lambda _package: "another")
    assert Artefacts(tmp_path, "fp8-flash4").path != path


PROCESS = """
import sys, torch
from pathlib import Path
from engine.compiling import Artefacts, CompiledBlocks
from tests.engine.tiny_wan import make_wan, wan_inputs
model = make_wan(0, layers=1)
blocks = CompiledBlocks([model], Artefacts(Path(sys.argv[1]), "test"))
for _ in range(2):
    with torch.inference_mode():
        model(**wan_inputs())
    blocks.wait()
hits = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
print(blocks._is_warm, hits, blocks.save(), blocks.notes)
"""


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_second_process_finds_what_the_first_compiled(tmp_path):
    """With the real compiler (C++ here): behind in the first process, adopted from its cache, read by the
    second."""
    said = []
    for cache in ("first", "second"):
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / cache), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, str(tmp_path / "kept")],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        said.append(done.stdout.strip())
    assert said == ["False 1 True []", "True 1 True []"]
