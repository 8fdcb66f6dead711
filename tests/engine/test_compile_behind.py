"""When blocks are compiled: before they are needed, behind the job, and never for longer than its patience."""

import logging
import threading
from types import SimpleNamespace

import pytest
import torch

from engine import compiling
from engine.artefacts import Artefacts
from engine.block_graph import BlockGraph
from engine.compiling import CompiledBlocks, graph_count
from tests.engine.compiled_wan import FOR_EVER_S, Gate, announce, forward, patient
from tests.engine.tiny_wan import make_wan


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


class Waits(threading.Event):
    """Set as soon as somebody waits for a compiler; and for how long each was ready to."""

    def __init__(self):
        super().__init__()
        self.timeouts_s = []


@pytest.fixture
def waits(monkeypatch):
    waits, join = Waits(), BlockGraph.join

    def watched(graph, timeout_s=None):
        waits.timeouts_s.append(timeout_s)
        waits.set()
        join(graph, timeout_s)

    monkeypatch.setattr(BlockGraph, "join", watched)
    return waits


def test_expected_size_is_compiled_before_the_first_forward():
    gate, model = Gate(), make_wan(0)
    expected = forward(model)
    blocks = CompiledBlocks([model], backend=gate, patience_s=0.0)
    announce(blocks, model)
    gate.is_open.set()
    blocks.wait()
    assert gate.threads == ["compile-behind"]
    assert torch.equal(forward(model), expected)
    assert blocks.account[1:] == (0.0, 0.0, 1.0)
    assert graph_count() == 1


def test_size_that_nobody_expected_begins_with_its_first_block():
    """The negative of the test before: without the announcement the first forward is eager."""
    gate, model = Gate(), make_wan(0)
    blocks = CompiledBlocks([model], backend=gate, patience_s=0.0)
    forward(model)
    gate.is_open.set()
    blocks.wait()
    assert blocks.account.eager_forwards == 1.0


def test_graph_that_no_job_waits_for_is_begun_when_its_forwards_are_over():
    gate, model = Gate(), make_wan(0)
    expected = forward(model)
    blocks = CompiledBlocks([model], backend=gate, patience_s=None)
    blocks.begin_job()
    gate.is_open.set()
    for _ in range(2):
        assert torch.equal(forward(model), expected)
    blocks.wait()
    assert gate.threads == []
    for _ in range(2):
        blocks.end_job()
        blocks.wait()
        assert (blocks.ready, gate.threads) == (1, ["compile-behind"])
    blocks.begin_job()
    assert torch.equal(forward(model), expected)
    assert (blocks.account.eager_forwards, blocks.account.compiled_forwards) == (2.0, 1.0)
    forward(model, height=8)
    blocks.end_job()
    blocks.wait()
    assert (blocks.ready, graph_count()) == (2, 2)


def test_sizes_beyond_the_most_graphs_are_begun_by_no_job_end(monkeypatch):
    monkeypatch.setattr(compiling, "MAX_GRAPHS", 1)
    model = make_wan(0)
    blocks = CompiledBlocks([model], backend="eager", patience_s=None)
    for height in (4, 8, 4, 8):
        forward(model, height)
        blocks.end_job()
        blocks.wait()
    assert (graph_count(), blocks.ready, len(blocks.notes)) == (1, 1, 1)


def test_cold_cache_serves_eagerly_once_the_patience_is_spent():
    """The compiler is held until the eager forwards are done: if the job waited for it, this would never end."""
    gate, model = Gate(), make_wan(0)
    expected = forward(model)
    blocks = CompiledBlocks([model], backend=gate, patience_s=0.3)
    assert torch.equal(forward(model), expected)
    waited_s = blocks.account.wait_s
    assert waited_s >= 0.3
    assert torch.equal(forward(model), expected)
    assert blocks.account.wait_s == waited_s
    assert blocks.account.eager_forwards == 2.0
    gate.is_open.set()
    blocks.wait()
    assert torch.equal(forward(model), expected)
    assert blocks.account.compiled_forwards == 1.0
    assert gate.threads == ["compile-behind"]
    assert graph_count() == 1


def test_job_waits_for_its_compiler_while_patience_lasts(waits):
    """The negative of the test before: the same compiler, opened while the job waits."""
    gate, model = Gate(), make_wan(0)
    blocks = CompiledBlocks([model], backend=gate, patience_s=FOR_EVER_S)
    opener = threading.Thread(target=lambda: (waits.wait(FOR_EVER_S), gate.is_open.set()))
    opener.start()
    forward(model)
    opener.join()
    assert blocks.account[2:] == (0.0, 1.0)
    assert blocks.account.wait_s > 0.0


def test_patience_is_one_for_all_sizes_of_a_job_and_new_for_the_next_job(waits):
    gate, model = Gate(), make_wan(0, layers=1)
    blocks = CompiledBlocks([model], backend=gate, patience_s=0.2)
    forward(model, 4)
    forward(model, 8)  # there is nothing left to wait
    blocks.begin_job()
    forward(model, 4)  # this size was waited for once already
    forward(model, 12)
    assert waits.timeouts_s == [0.2, 0.0, 0.2]
    assert blocks.account.wait_s >= 0.4
    gate.is_open.set()
    blocks.wait()


def test_graph_is_taken_up_in_the_middle_of_a_forward():
    gate, model = Gate(), make_wan(0, layers=4)
    expected = forward(model)
    blocks = CompiledBlocks([model], backend=gate, patience_s=0.0)

    def finish(*_):
        gate.is_open.set()
        blocks.wait()

    model.blocks[1].register_forward_hook(finish)
    assert torch.equal(forward(model), expected)
    assert blocks.account[2:] == (0.5, 0.5)


def test_default_patience_is_what_a_first_job_may_lose():
    assert compiling.PATIENCE_S == 5.0


def test_eager_blocks_leave_the_interpreter_to_the_compiler_only_while_it_works(monkeypatch):
    gate, model, waits = Gate(), make_wan(0, layers=3), []
    monkeypatch.setattr(CompiledBlocks, "_let_others_run", lambda *_: waits.append(1))
    blocks = CompiledBlocks([model], backend=gate, patience_s=0.0)
    forward(model)
    assert len(waits) == 3
    gate.is_open.set()
    blocks.wait()
    forward(model)
    assert len(waits) == 3


def test_eager_blocks_are_waited_for_with_some_more_before_the_card(monkeypatch):
    done, number = [], iter(range(9))

    class Event:
        def __init__(self, blocking):
            assert blocking  # a processor that spins is one less for the compiler
            self.number = next(number)

        def record(self, stream):
            done.append(("given", self.number, stream))

        def synchronize(self):
            done.append(("waited", self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    gate, model = Gate(), make_wan(0, layers=1)
    blocks = CompiledBlocks([model], backend=gate, patience_s=0.0)
    for _ in range(6):
        blocks._let_others_run(SimpleNamespace(is_cuda=True, device="cuda:0"))
    stream = "stream of cuda:0"
    assert done == [
        *[("given", i, stream) for i in range(5)], ("waited", 0), ("given", 5, stream), ("waited", 1),
    ]  # fmt: skip


def test_compilation_that_was_skipped_behind_is_tried_again():
    model = make_wan(0)
    blocks = patient(model)
    with torch.compiler.set_stance("force_eager"):
        announce(blocks, model)
        blocks.wait()
    assert blocks.ready == 0
    forward(model)
    assert blocks.ready == 1
    assert blocks.notes == []


def test_save_keeps_a_size_once_and_only_after_it_has_run(tmp_path, monkeypatch):
    """What is found out at a kernel's first run belongs to what is kept."""
    kept = []
    monkeypatch.setattr(Artefacts, "save", lambda self: kept.append(self.path) is None)
    model = make_wan(0, layers=1)
    blocks = CompiledBlocks([model], Artefacts(tmp_path, "test"), backend="eager", patience_s=FOR_EVER_S)
    announce(blocks, model)
    blocks.wait()
    assert not blocks.save()
    forward(model)
    assert blocks.save()
    assert not blocks.save()
    forward(model, height=8)
    assert blocks.save()
    assert len(set(kept)) == 2


def test_save_that_failed_is_tried_again_and_nothing_is_kept_till_then(tmp_path, monkeypatch):
    """A disk that was full once."""
    said = [False, True]
    monkeypatch.setattr(Artefacts, "save", lambda _self: said.pop(0))
    model = make_wan(0, layers=1)
    blocks = CompiledBlocks([model], Artefacts(tmp_path, "test"), backend="eager", patience_s=FOR_EVER_S)
    forward(model)
    assert (blocks.save(), blocks.is_kept) == (False, False)
    assert (blocks.save(), blocks.is_kept) == (True, True)
    assert not blocks.save()


def test_save_waits_for_another_time_while_the_compiler_works(tmp_path):
    gate, model = Gate(), make_wan(0, layers=1)
    blocks = CompiledBlocks([model], Artefacts(tmp_path, "test"), backend=gate, patience_s=FOR_EVER_S)
    gate.is_open.set()
    forward(model)
    gate.is_open.clear()
    announce(blocks, model, height=8)
    assert not blocks.save()
    gate.is_open.set()
    blocks.wait()
    assert [graph.is_kept for graph in blocks._graphs.values()] == [False, False]


def test_finished_compilation_is_logged(caplog):
    model = make_wan(0, layers=1)
    patient(model)
    with caplog.at_level(logging.INFO, logger="engine.block_graph"):
        forward(model)
    assert any("compiled behind in" in record.getMessage() for record in caplog.records)
