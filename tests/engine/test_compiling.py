"""Compiled blocks: how many graphs there are, which tensors their code reads, and that nothing breaks by them."""

import copy

import pytest
import torch

from engine import attention, compiling
from engine.compiling import CompiledBlocks, graph_count
from engine.experts import RollingExperts
from engine.linear8 import replace_linears
from tests.engine.compiled_wan import forward, patient
from tests.engine.tiny_wan import make_wan, wan_inputs


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def test_one_graph_serves_every_block_of_both_experts_and_the_second_request():
    models = [make_wan(0), make_wan(1)]
    expected = [forward(model) for model in models]
    blocks = patient(*models)
    assert all(torch.equal(forward(model), out) for model, out in zip(models, expected, strict=True))
    assert graph_count() == 1
    forward(models[0])
    forward(models[1])
    assert graph_count() == 1
    assert blocks.account[2:] == (0.0, 4.0)


def test_each_number_of_tokens_has_one_graph_whatever_the_orientation():
    model = make_wan(0)
    patient(model)
    forward(model, height=4)
    forward(model, height=8)
    assert graph_count() == 2
    wide = wan_inputs(8)
    wide["hidden_states"] = wide["hidden_states"].transpose(3, 4).contiguous()
    with torch.inference_mode():
        model(**wide)
    assert graph_count() == 2


def test_quantised_rolling_experts_keep_their_graph_over_swaps():
    models = {"high": make_wan(0), "low": make_wan(1)}
    for model in models.values():
        replace_linears(model, "fp8")
        attention.install(model, "native")
    expected = {name: forward(model) for name, model in models.items()}
    experts = RollingExperts(copy.deepcopy(models), "cpu")
    blocks = patient(experts.model)
    for _ in range(2):
        for name, then in (("high", "low"), ("low", "high")):
            with experts.use(name, forwards=2, then=then) as model:
                assert torch.equal(forward(model), expected[name])
                assert torch.equal(forward(model), expected[name])
    assert graph_count() == 1
    assert blocks.account.compiled_forwards == 8.0


def test_code_made_for_one_block_reads_the_tensors_of_the_block_that_runs():
    """The same code for blocks with other weights, other tensor objects and another model."""
    models = [make_wan(0, layers=2), make_wan(1, layers=2)]
    blocks = patient(models[0], models[1])
    forward(models[0])
    assert blocks.ready == 1
    with torch.no_grad():
        models[1].blocks[1].ffn.net[2].weight = torch.nn.Parameter(torch.ones(32, 64), requires_grad=False)
    compiled = forward(models[1])
    blocks.remove()
    assert torch.equal(compiled, forward(models[1]))


def test_weights_of_another_type_get_a_graph_of_their_own():
    """What Dynamo would have guarded: code for fp32 weights must not run on bf16 ones."""
    models = [make_wan(0, layers=1), make_wan(0, layers=1).to(torch.bfloat16)]
    blocks = patient(*models)
    forward(models[0])
    inputs = {name: x.bfloat16() for name, x in wan_inputs().items()}
    with torch.inference_mode():
        compiled = models[1](**inputs).sample
    assert blocks.ready == 2
    blocks.remove()
    with torch.inference_mode():
        assert torch.equal(compiled, models[1](**inputs).sample)


def test_profile_that_is_loaded_again_is_compiled_anew():
    """Dynamo knows the block's code already; what it knows leads to the first one's graph."""
    for seed in (0, 1):
        model = make_wan(seed)
        expected = forward(model)
        blocks = patient(model)
        assert torch.equal(forward(model), expected)
        assert blocks.ready == 1
        assert blocks.account.eager_forwards == 0.0
        blocks.remove()


def test_blocks_of_different_structure_are_refused():
    with pytest.raises(ValueError, match="blocks differ"):
        CompiledBlocks([make_wan(0, ffn_dim=64), make_wan(0, ffn_dim=96)], backend="eager")


def test_hooks_run_around_the_compiled_block():
    model = make_wan(0, layers=2)
    patient(model)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: seen.append(1))
    forward(model)
    assert len(seen) == 2
    assert graph_count() == 1


def test_hook_inside_a_block_is_not_passed_by():
    model = make_wan(0)
    patient(model)
    compiled = forward(model)
    handle = model.blocks[1].ffn.net[2].register_forward_hook(lambda _module, _inputs, out: out + 1)
    assert not torch.equal(forward(model), compiled)
    handle.remove()
    assert torch.equal(forward(model), compiled)
    assert graph_count() == 1


def test_hook_inside_a_block_starts_no_compilation_and_waits_for_none():
    model = make_wan(0)
    blocks = patient(model)
    for block in model.blocks:
        block.ffn.net[2].register_forward_hook(lambda _module, _inputs, out: out)
    forward(model)
    blocks.wait()
    assert graph_count() == 0
    assert blocks.account == (0.0, 0.0, 1.0, 0.0)


def test_compiler_that_fails_leaves_the_eager_block_and_a_note():
    model = make_wan(0)
    expected = forward(model)

    def broken(graph, inputs):
        raise NotImplementedError("no such instruction")

    blocks = patient(model, backend=broken)
    assert torch.equal(forward(model), expected)
    assert torch.equal(forward(model), expected)
    assert len(blocks.notes) == 1
    assert "8 tokens" in blocks.notes[0]
    assert "no such instruction" in blocks.notes[0]


def test_code_that_fails_at_its_first_call_leaves_the_eager_block_and_a_note():
    model = make_wan(0)
    expected = forward(model)

    def backend(graph, inputs):
        def unusable(*args):
            raise RuntimeError("out of resources: shared memory")

        return unusable

    blocks = patient(model, backend=backend)
    assert torch.equal(forward(model), expected)
    assert torch.equal(forward(model), expected)
    assert blocks.notes == ["blocks run uncompiled for 8 tokens: out of resources: shared memory"]


def test_error_of_code_that_has_run_is_the_jobs():
    model = make_wan(0)
    calls = []

    def backend(graph, inputs):
        def sometimes(*args):
            calls.append(1)
            if len(calls) > 2:
                raise RuntimeError("the job's own")
            return graph.forward(*args)

        return sometimes

    blocks = patient(model, backend=backend)
    with pytest.raises(RuntimeError, match="the job's own"):
        forward(model)
    assert blocks.notes == []


def test_out_of_memory_in_the_job_is_not_taken_for_the_compilers():
    model = make_wan(0)

    def backend(graph, inputs):
        def out_of_memory(*args):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return out_of_memory

    blocks = patient(model, backend=backend)
    with pytest.raises(torch.OutOfMemoryError):
        forward(model)
    assert blocks.notes == []


def test_more_sizes_than_graphs_run_eagerly_and_say_so(monkeypatch):
    monkeypatch.setattr(compiling, "MAX_GRAPHS", 2)
    model = make_wan(0)
    expected = forward(model, height=12)
    blocks = patient(model)
    for height in (4, 8, 12, 12):
        out = forward(model, height)
    assert torch.equal(out, expected)
    assert graph_count() == 2
    assert blocks.notes == ["blocks run uncompiled for 24 tokens: more than 2 sizes"]


def test_remove_gives_the_blocks_their_own_forward_back():
    model = make_wan(0)
    blocks = patient(model)
    blocks.remove()
    forward(model)
    assert graph_count() == 0
    assert not model._forward_pre_hooks
