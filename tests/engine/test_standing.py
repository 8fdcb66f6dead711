"""Modules that leave the card and come back: the same tensors, the same bits, the same compiled code."""

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from engine.compiling import graph_count
from engine.linear8 import replace_linears
from engine.packing import Field, HostCopy, layout
from engine.parking import NotLocked
from engine.standing import Standing
from tests.engine.compiled_wan import announce, forward, patient
from tests.engine.tiny_wan import make_wan, wan_inputs


@pytest.fixture
def model() -> nn.Module:
    return make_wan(0)


def tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def size_bytes(*modules: nn.Module) -> int:
    return sum(piece.size_bytes for module in modules for piece in layout(module))


def there_and_back(standing: Standing) -> tuple[int, int]:
    return standing.park(), standing.bring_back()


def test_model_computes_the_same_after_each_return(model: nn.Module) -> None:
    expected = forward(model)
    standing = Standing([model], "cpu")
    for _ in range(3):
        there_and_back(standing)
        assert torch.equal(forward(model), expected)


def test_tensors_stay_the_objects_they_are_and_their_memory_is_new(model: nn.Module) -> None:
    before = tensors(model)
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in before]
    standing = Standing([model], "cpu")
    standing.park()
    assert all(storage.expired() for storage in storages)
    parked = {tensor.untyped_storage().data_ptr() for tensor in before}
    standing.bring_back()
    assert all(now is then for now, then in zip(tensors(model), before, strict=True))
    assert not parked & {tensor.untyped_storage().data_ptr() for tensor in before}


def test_card_memory_of_a_return_is_given_back_by_the_next_parking(model: nn.Module) -> None:
    standing = Standing([model], "cpu")
    there_and_back(standing)
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors(model)]
    standing.park()
    assert all(storage.expired() for storage in storages)


def test_each_byte_goes_to_the_host_once_and_to_the_card_with_each_return(model: nn.Module) -> None:
    standing = Standing([model], "cpu")
    size = size_bytes(model)
    assert (standing.needed_bytes, standing.held_bytes) == (size, 0)
    assert [there_and_back(standing) for _ in range(3)] == [(size, size), (0, size), (0, size)]
    assert (standing.needed_bytes, standing.held_bytes) == (0, size)


def test_several_modules_go_together_and_one_that_is_given_twice_counts_once(model: nn.Module) -> None:
    other = make_wan(1)
    expected = [forward(each) for each in (model, other)]
    standing = Standing([model, other, model], "cpu")
    assert there_and_back(standing) == (size_bytes(model, other),) * 2
    assert all(torch.equal(forward(each), out) for each, out in zip((model, other), expected, strict=True))


def test_8_bit_layers_come_back(model: nn.Module) -> None:
    replace_linears(model, "fp8")
    expected = forward(model)
    there_and_back(Standing([model], "cpu"))
    assert torch.equal(forward(model), expected)


def test_layers_that_are_replaced_after_the_load_are_what_is_parked(model: nn.Module) -> None:
    standing = Standing([model], "cpu")
    replace_linears(model, "int8")
    assert there_and_back(standing)[0] == size_bytes(model)


def channels_last() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last).requires_grad_(False)


def test_order_of_axes_is_kept() -> None:
    conv = channels_last()
    strides, weight = conv.weight.stride(), conv.weight.clone()
    standing = Standing([conv], "cpu")
    standing.park()
    assert conv.weight.stride() == strides
    standing.bring_back()
    assert conv.weight.stride() == strides == (36, 1, 12, 4)
    assert torch.equal(conv.weight, weight)


def test_order_of_axes_without_strides_would_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, view = channels_last(), Field.view
    monkeypatch.setattr(Field, "view", lambda self, buffer: view(self, buffer).contiguous())
    there_and_back(Standing([conv], "cpu"))
    assert conv.weight.stride() == (36, 9, 3, 1)


def test_compiled_blocks_stay_valid_and_no_graph_is_added(model: nn.Module) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    blocks = patient(model)
    announce(blocks, model)
    expected = forward(model)
    assert graph_count() == 1
    standing = Standing([model], "cpu")
    for _ in range(2):
        there_and_back(standing)
        assert torch.equal(forward(model), expected)
    assert (graph_count(), blocks.ready, blocks.notes) == (1, 1, [])
    assert blocks.account.eager_forwards == 0
    blocks.remove()


def test_buffer_that_is_a_view_does_not_keep_what_it_was_cut_from() -> None:
    torch.manual_seed(0)
    module = nn.Module()
    module.register_buffer("scale", torch.randn(8, 1).squeeze(-1))
    expected, storage = module.scale.clone(), StorageWeakRef(module.scale.untyped_storage())
    there_and_back(Standing([module], "cpu"))
    assert storage.expired()
    assert torch.equal(module.scale, expected)


def test_tied_tensors_stay_one() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    both = nn.Sequential(first, second).requires_grad_(False)
    there_and_back(Standing([both], "cpu"))
    assert first.weight is second.weight
    assert first.weight.data_ptr() == second.weight.data_ptr()


def refuses_at(monkeypatch: pytest.MonkeyPatch, piece: int, fault: Exception | None = None) -> None:
    """Stands for the driver: piece `piece` is not locked, or raises."""

    def settle(host: HostCopy, i: int) -> None:
        if i == piece:
            if fault is not None:
                raise fault
            host.notes = ("host memory could not be page-locked (CUDA error 2): copies will be slow",)

    monkeypatch.setattr(HostCopy, "settle", settle)


def test_memory_that_cannot_be_locked_ends_the_parking_at_that_piece(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses_at(monkeypatch, 2)
    standing = Standing([model], "cpu")
    with pytest.raises(NotLocked, match="CUDA error 2"):
        standing.park()
    assert standing.held_bytes == sum(piece.size_bytes for piece in layout(model)[:3])


def test_unload_after_a_fault_in_the_middle_of_parking_leaves_nothing(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing = Standing([model, make_wan(1)], "cpu")
    refuses_at(monkeypatch, 3, MemoryError())
    with pytest.raises(MemoryError):
        standing.park()
    standing.unload()
    assert {tensor.device.type for tensor in tensors(model)} == {"meta"}
    assert standing.held_bytes == 0


def test_half_a_parking_without_an_unload_would_come_back_incomplete(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why nothing but unloading is left after a fault: the card would get a part."""
    standing = Standing([model, make_wan(1)], "cpu")
    with monkeypatch.context() as patch:
        refuses_at(patch, 3, MemoryError())
        with pytest.raises(MemoryError):
            standing.park()
    with pytest.raises(ValueError, match="shorter"):
        standing.bring_back()


def test_unload_gives_back_host_and_card(model: nn.Module) -> None:
    standing = Standing([model], "cpu")
    there_and_back(standing)
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors(model)]
    hosts = [StorageWeakRef(buffer.untyped_storage()) for host in standing._hosts for buffer in host.buffers]
    standing.unload()
    assert all(storage.expired() for storage in storages + hosts)


def test_unload_waits_for_copies_before_what_they_read_from_goes(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A return that fails leaves copies under way. Here the card is only asked to wait, in the right place."""
    standing, order, release = Standing([model], "cpu"), list[str](), HostCopy.release
    standing.park()
    standing._device = "cuda"
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: order.append("copies are done"))
    monkeypatch.setattr(HostCopy, "release", lambda host: (order.append("source is gone"), release(host)))
    standing.unload()
    assert order == ["copies are done", "source is gone"]


def test_parking_in_inference_mode_leaves_tensors_that_can_be_written_outside(model: nn.Module) -> None:
    original = copy.deepcopy(model)
    with torch.inference_mode():
        there_and_back(Standing([model], "cpu"))
    with torch.no_grad():
        next(model.parameters()).add_(0)
    assert torch.equal(forward(model), forward(original))


@pytest.mark.gpu
def test_card_gets_its_memory_back_and_the_host_copy_is_page_locked() -> None:
    model = make_wan(0).to("cuda")
    inputs = {name: each.to("cuda") for name, each in wan_inputs().items()}
    with torch.inference_mode():
        expected = model(**inputs).sample
        base = torch.cuda.memory_allocated()
        standing = Standing([model], "cuda")
        for _ in range(3):
            standing.park()
            assert {each.device.type for each in tensors(model)} == {"cpu"}
            assert all(buffer.is_pinned() for host in standing._hosts for buffer in host.buffers if buffer.numel())
            parked = torch.cuda.memory_allocated()
            assert standing.bring_back() == size_bytes(model)
            assert torch.equal(model(**inputs).sample, expected)
        assert base - parked >= sum(each.numel() * each.element_size() for each in tensors(model))
    standing.unload()
