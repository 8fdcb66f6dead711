"""Experts that share storage: what runs is always one whole expert, and what moves is counted."""

import copy

import pytest
import torch

from engine.experts import FixedExperts, RollingExperts
from engine.linear8 import replace_linears
from tests.engine.tiny_wan import make_wan, wan_inputs

LAYERS = 4
PIECES = LAYERS + 2


@pytest.fixture(scope="module")
def models():
    return {"high": make_wan(0, LAYERS), "low": make_wan(1, LAYERS)}


@pytest.fixture(scope="module")
def expected(models):
    with torch.inference_mode():
        return {name: model(**wan_inputs()).sample for name, model in models.items()}


@pytest.fixture
def rolling(models):
    return RollingExperts(copy.deepcopy(models), "cpu")


def forward(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(**wan_inputs()).sample


def run_job(experts, phases=(("high", 2), ("low", 4)), hinted: bool = True) -> list[torch.Tensor]:
    """The two-phase loop: one `use` a phase, and the first expert is wanted again after the last."""
    outputs = []
    for i, (expert, forwards) in enumerate(phases):
        then = phases[(i + 1) % len(phases)][0]
        with experts.use(expert, forwards if hinted else 0, then if hinted else None) as model:
            outputs += [forward(model) for _ in range(forwards)]
    return outputs


def is_job(outputs, expected) -> bool:
    wanted = [expected["high"]] * 2 + [expected["low"]] * 4
    return all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))


def addresses(experts) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in experts.model.named_parameters()}


def expert_bytes(experts) -> int:
    return sum(piece.size_bytes for piece in experts._pieces)


def test_fixed_experts_move_nothing(models, expected):
    experts = FixedExperts(models)
    assert is_job(run_job(experts), expected)
    assert experts.bytes_moved == 0


@pytest.mark.parametrize("hinted", [True, False])
def test_rolling_experts_compute_what_the_plain_models_compute(rolling, expected, hinted):
    for _ in range(2):
        assert is_job(run_job(rolling, hinted=hinted), expected)


@pytest.mark.parametrize("hinted", [True, False])
def test_warm_job_moves_two_experts(rolling, hinted):
    run_job(rolling, hinted=hinted)
    before = rolling.bytes_moved
    run_job(rolling, hinted=hinted)
    assert rolling.bytes_moved - before == 2 * expert_bytes(rolling)


def test_no_address_changes_over_two_jobs(rolling):
    before = addresses(rolling)
    run_job(rolling)
    run_job(rolling)
    assert addresses(rolling) == before


def test_last_forward_leaves_the_next_expert_in_place(rolling, expected):
    with rolling.use("high", forwards=2, then="low") as model:
        forward(model)
        moved_before_last = rolling.bytes_moved
        forward(model)
    assert rolling.bytes_moved - moved_before_last == expert_bytes(rolling)
    with rolling.use("low", forwards=1) as model:
        assert torch.equal(forward(model), expected["low"])
    assert rolling.bytes_moved - moved_before_last == expert_bytes(rolling)


def test_block_is_replaced_while_the_later_blocks_still_run(rolling):
    """The copy of block 0 must not wait for the end of the forward: that is what hides it."""
    with rolling.use("high", forwards=1, then="low") as model:
        held = []
        handle = model.blocks[2].register_forward_pre_hook(lambda *_: held.extend(rolling._holds))
        forward(model)
        handle.remove()
    assert held == [("low", 0), ("high", 1), ("low", 2), ("low", 3), ("high", 4), ("high", 5)]


def test_single_phase_jobs_move_nothing_once_warm(rolling, expected):
    phases = (("low", 2),)
    run_job(rolling, phases)
    before = rolling.bytes_moved
    assert all(torch.equal(out, expected["low"]) for out in run_job(rolling, phases))
    assert rolling.bytes_moved == before


def test_call_after_the_announced_last_one_is_refused(rolling):
    with rolling.use("high", forwards=1, then="low") as model:
        forward(model)
        with pytest.raises(RuntimeError, match="announced for 1"):
            forward(model)


def test_unknown_next_expert_is_refused_before_anything_runs(rolling):
    with pytest.raises(ValueError, match="middle"), rolling.use("high", forwards=1, then="middle"):
        pass


def fail_at(experts, monkeypatch, piece: int, expert: str) -> None:
    copy_piece = experts._copy

    def failing(name, i):
        if (name, i) == (expert, piece):
            experts._card[experts._slot(i)].fill_(255)  # half a copy: neither expert's bytes
            raise MemoryError("injected")
        copy_piece(name, i)

    monkeypatch.setattr(experts, "_copy", failing)


@pytest.mark.parametrize("piece", range(PIECES))
def test_fault_in_the_middle_of_a_swap_leaves_the_next_job_right(rolling, expected, monkeypatch, piece):
    run_job(rolling)
    with monkeypatch.context() as patch:
        fail_at(rolling, patch, piece, "low")
        with pytest.raises(MemoryError):
            run_job(rolling)
    assert is_job(run_job(rolling), expected)


def test_fault_without_the_tags_would_run_a_mixed_model(rolling, expected, monkeypatch):
    run_job(rolling)
    with monkeypatch.context() as patch:
        fail_at(rolling, patch, 3, "low")
        with pytest.raises(MemoryError):
            run_job(rolling)
    rolling._holds = [("high", i) for i in range(PIECES)]
    assert not is_job(run_job(rolling), expected)


def test_repair_brings_one_whole_expert_in(rolling, monkeypatch):
    run_job(rolling)
    with monkeypatch.context() as patch:
        fail_at(rolling, patch, 3, "low")
        with pytest.raises(MemoryError):
            run_job(rolling)
    wrong = [rolling._pieces[i].size_bytes for i in (0, 2, 3)]  # entry, block 0, and block 1 that failed
    assert rolling.repair("high") == sum(wrong)
    assert rolling.repair("high") == 0


def test_job_cancelled_between_steps_leaves_the_next_one_right(rolling, expected):
    with pytest.raises(KeyboardInterrupt), rolling.use("high", forwards=2, then="low") as model:
        forward(model)
        raise KeyboardInterrupt
    assert is_job(run_job(rolling), expected)


def test_hooks_are_gone_after_use(rolling):
    run_job(rolling)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in rolling.model.modules()] == [0] * len(
        list(rolling.model.modules())
    )


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_streaming_computes_the_same_from_a_few_slots(models, expected, slots):
    experts = RollingExperts(copy.deepcopy(models), "cpu", slots=slots)
    for _ in range(2):
        assert is_job(run_job(experts), expected)
    assert len(experts._card) == 2 + slots


def test_streaming_moves_every_block_of_every_forward_once(models):
    experts = RollingExperts(copy.deepcopy(models), "cpu", slots=2)
    run_job(experts)
    before = experts.bytes_moved
    run_job(experts)
    entry, exit_, block = (experts._pieces[i].size_bytes for i in (0, 1, 2))
    assert experts.bytes_moved - before == 6 * LAYERS * block + 2 * (entry + exit_)


def test_fault_while_streaming_leaves_the_next_job_right(models, expected, monkeypatch):
    experts = RollingExperts(copy.deepcopy(models), "cpu", slots=2)
    with monkeypatch.context() as patch:
        fail_at(experts, patch, 4, "low")
        with pytest.raises(MemoryError):
            run_job(experts)
    assert is_job(run_job(experts), expected)


def test_8_bit_experts_swap_to_the_same_output(models):
    quantised = copy.deepcopy(models)
    for model in quantised.values():
        replace_linears(model, "fp8")
    expected = {name: forward(model) for name, model in quantised.items()}
    experts = RollingExperts(copy.deepcopy(quantised), "cpu")
    assert is_job(run_job(experts), expected)
    assert is_job(run_job(experts), expected)


def test_experts_of_different_layout_are_refused(models):
    with pytest.raises(ValueError, match="differ"):
        RollingExperts({"high": models["high"], "low": make_wan(1, LAYERS, ffn_dim=96)}, "cpu")


def test_blocks_that_differ_cannot_share_slots():
    model = make_wan(0, LAYERS)
    model.blocks[1].register_buffer("extra", torch.zeros(3))
    with pytest.raises(ValueError, match="blocks differ"):
        RollingExperts({"single": copy.deepcopy(model)}, "cpu", slots=2)
    RollingExperts({"single": model}, "cpu")


def test_unload_leaves_no_storage(rolling):
    rolling.unload()
    assert {tensor.device.type for tensor in rolling.model.parameters()} == {"meta"}
    assert (rolling._card, rolling._host) == ([], {})
