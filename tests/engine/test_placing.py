"""A profile's models stand at once and their weights follow: right, in the order of need, and only once."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.random_bake import write_bake
from engine import placing
from engine.arrival import Arrival
from engine.card import Card, Levers
from engine.compiling import Artefacts, CompiledBlocks, graph_count
from engine.eight_bits import to_eight_bits
from engine.linear8 import KINDS
from engine.parts import FolderParts
from engine.placing import Placed, place
from engine.profiles import PROFILES
from engine.progress import Progress
from engine.settings import Settings
from engine.speed import narrow
from engine.tensorfile import read_offsets
from engine.weights import locate
from schemas.errors import Cancelled, RequestTooLarge, WeightsCorrupt
from tests.engine.disk import Disk, endless_ahead, readers, readers_ahead
from tests.engine.test_parts import MODELS, by_library
from tests.engine.twin_models import EXPERTS, assert_equal, by_the_library, data_bytes, file_of, forward, tensors

CPU = Card("cpu", 2**40)


@pytest.fixture
def parts(twins: Path) -> Any:
    return locate(PROFILES["wan22_i2v_svi"], Settings(weights_dir=twins)).parts()


@pytest.fixture
def placed(parts: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Placed]]:
    """Places the twin, one lane and a few kilobytes a read; unloads what was placed."""
    monkeypatch.setattr(placing, "Arrival", partial(Arrival, lanes=1, chunk_bytes=4096))
    made: list[Placed] = []

    def act(card: Card = CPU, of: Any = parts) -> Placed:
        made.append(place(of.profile, of, card, EXPERTS))
        return made[-1]

    yield act
    for each in made:
        each.unload()
    assert readers() == []


@pytest.mark.parametrize(("profile", "name"), MODELS, ids=lambda value: getattr(value, "name", value))
def test_component_read_by_us_is_the_librarys_own(profile: Any, name: str, twins: Path) -> None:
    of = locate(profile, Settings(weights_dir=twins)).parts()
    assert isinstance(of, FolderParts)
    skeleton = of.skeleton(name, "cpu")
    assert skeleton is not None, "the twin is not read by us"
    arrival = Arrival("cpu", chunk_bytes=4096)
    host, coming = skeleton.pack("cpu", arrival)
    coming.wait_whole()
    assert_equal(skeleton.model, by_library(profile, name, twins))
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors(skeleton.model).values() if tensor.numel()}
    assert storages <= {buffer.data_ptr() for buffer in host.buffers}
    arrival.close()


def test_every_byte_is_read_once_and_in_the_order_of_need(
    placed: Callable[..., Placed], disk: Disk, twins: Path
) -> None:
    made = placed()
    with made.attended(Progress()):
        for expert in EXPERTS:
            with made.experts.use(expert) as model:
                forward(model)
    assert readers() == []
    order = ("shared/wan_vae", "shared/umt5_xxl", "wan22_i2v_svi/transformer", "wan22_i2v_svi/transformer_2")
    files = [file_of(twins, folder) for folder in order]
    assert list(dict.fromkeys(path for path, _, _ in disk.reads)) == files
    assert sum(count for _, _, count in disk.reads) == sum(data_bytes(path) for path in files)
    assert len({(path, offset) for path, offset, _ in disk.reads}) == len(disk.reads)


def test_read_ahead_goes_on_while_models_are_placed_and_ends_with_the_job(
    placed: Callable[..., Placed], parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = placed(of=replace(parts, ahead=endless_ahead(monkeypatch, 2**40)))
    with made.attended(Progress()):
        for expert in EXPERTS:
            with made.experts.use(expert) as model:
                forward(model)
        assert readers_ahead()
    assert readers_ahead() == []


def test_read_ahead_ends_when_the_placed_models_have_caught_up(
    placed: Callable[..., Placed], parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = endless_ahead(monkeypatch, 1_200_000)  # in the middle of the first expert
    made = placed(of=replace(parts, ahead=ahead))
    with made.experts.use("high") as model:
        forward(model)
    for thread in ahead._threads:
        thread.join(10)
    assert readers_ahead() == []


@pytest.mark.parametrize("refusal", [RequestTooLarge("no room"), WeightsCorrupt("damaged")])
def test_placing_that_fails_once_it_reads_leaves_no_read_ahead(
    refusal: Exception, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise refusal

    of = replace(parts, ahead=endless_ahead(monkeypatch, 2**40))
    monkeypatch.setattr(placing, "_experts", fails)
    with pytest.raises(type(refusal)):
        place(of.profile, of, CPU, EXPERTS)
    assert readers_ahead() == []


def test_tests_of_the_plans_precision_are_begun_before_models_are_built(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []

    def built(*_: Any) -> Any:
        assert begun == [("fp8", "cuda", Levers("flash4"))]
        raise RequestTooLarge("far enough")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(placing, "prove_ahead", lambda *of: begun.append(of))
    monkeypatch.setattr(placing, "Arrival", lambda _device: Arrival("cpu"))
    monkeypatch.setattr(placing, "_placed", built)
    with pytest.raises(RequestTooLarge, match="far enough"):
        place(parts.profile, parts, Card("cuda", 2**40, "fp8", Levers("flash4")), EXPERTS)


def test_nothing_is_read_for_good_before_every_model_is_built(
    placed: Callable[..., Placed], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    build = FolderParts.skeleton

    def build_and_look(self: FolderParts, name: str, device: str) -> Any:
        built = build(self, name, device)
        time.sleep(0.05)  # in which a reader would come to it
        read.append(sum(count for path, offset, count in disk.reads if path.suffix == ".safetensors" and offset))
        return built

    monkeypatch.setattr(FolderParts, "skeleton", build_and_look)
    placed()
    assert read == [0, 0, 0, 0]


def test_whole_load_ends_the_read_ahead(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(parts, ahead=endless_ahead(monkeypatch, 2**40)).load("vae")
    assert readers_ahead() == []


def test_picture_encoder_comes_before_the_transformer(twins: Path, disk: Disk, placed: Callable[..., Placed]) -> None:
    of = locate(PROFILES["wan21_i2v_480p"], Settings(weights_dir=twins)).parts()
    made = place(of.profile, of, CPU, {"single": "transformer"})
    with made.experts.use("single") as model:
        made.experts._coming["single"].wait_whole()
    read = [path.parent.name for path in dict.fromkeys(path for path, _, _ in disk.reads)]
    assert read == ["wan_vae", "umt5_xxl", "image_encoder", "transformer"]
    assert_equal(model, by_library(of.profile, "transformer", twins))
    made.unload()


def test_all_is_what_the_library_loads(placed: Callable[..., Placed], twins: Path) -> None:
    made = placed()
    for expert, name in EXPERTS.items():
        with made.experts.use(expert) as model:
            forward(model)
        assert_equal(model, by_the_library(name, twins))
    with made.encoders["text_encoder"]() as encoder:
        assert_equal(encoder, by_the_library("text_encoder", twins))
    assert_equal(made.vae, by_the_library("vae", twins))


def test_first_expert_runs_while_the_second_is_not_there(
    placed: Callable[..., Placed], disk: Disk, twins: Path
) -> None:
    low = file_of(twins, "wan22_i2v_svi/transformer_2")
    disk.held = lambda path, _: path == low
    disk.gate.clear()
    made = placed()
    with made.experts.use("high") as model:
        assert torch.equal(forward(model), forward(by_the_library("transformer", twins)))
    assert not made.experts._coming["low"].is_there(0)
    disk.gate.set()
    with made.experts.use("low") as model:
        assert torch.equal(forward(model), forward(by_the_library("transformer_2", twins)))


def test_block_runs_while_the_next_one_is_not_there(placed: Callable[..., Placed], disk: Disk, twins: Path) -> None:
    high = file_of(twins, "wan22_i2v_svi/transformer")
    with high.open("rb") as stream:
        places = read_offsets(stream)
    assert places is not None
    second = min(place.offset for name, place in places.items() if name.startswith("blocks.1."))
    disk.held = lambda path, offset: path == high and offset >= second
    disk.gate.clear()
    made = placed()
    ran: list[int] = []
    first_ran = threading.Event()
    outputs: list[torch.Tensor] = []

    def note(i: int) -> None:
        ran.append(i)
        first_ran.set()

    with made.experts.use("high") as model:
        for i, block in enumerate(model.blocks):
            block.register_forward_hook(lambda *_, i=i: note(i))
        runs = threading.Thread(target=lambda: outputs.append(forward(model)))
        runs.start()
        assert first_ran.wait(20)
        assert ran == [0]
        disk.gate.set()
        runs.join(20)
    assert torch.equal(outputs[0], forward(by_the_library("transformer", twins)))


def test_forward_without_waiting_would_be_wrong(placed: Callable[..., Placed], disk: Disk, twins: Path) -> None:
    """The guard's own test: what the hooks prevent."""
    disk.held = lambda path, _: path == file_of(twins, "wan22_i2v_svi/transformer")
    disk.gate.clear()
    made = placed()
    model = made.experts._models["high"]
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
    assert not torch.equal(forward(model), forward(by_the_library("transformer", twins)))
    disk.gate.set()


def test_addresses_stay_and_hooks_go(placed: Callable[..., Placed], disk: Disk, twins: Path) -> None:
    low = file_of(twins, "wan22_i2v_svi/transformer_2")
    disk.held = lambda path, _: path == low
    disk.gate.clear()
    made = placed()
    model = made.experts._models["low"]
    before = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    with made.experts.use("low"):
        assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 1 + len(model.blocks)
        disk.gate.set()
        forward(model)
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == before
    assert [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks] == []
    with made.experts.use("low"):
        assert [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks] == []


def test_blocks_compiled_while_they_are_waited_for_are_the_same_graph_afterwards(
    placed: Callable[..., Placed], tmp_path: Path
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = placed()

    class Warm(Artefacts):
        def load(self) -> bool:
            return True

    models = [made.experts._models[expert] for expert in EXPERTS]
    blocks = CompiledBlocks(models, Warm(tmp_path, "test"), backend="eager")
    for _ in range(2):
        for expert in EXPERTS:
            with made.experts.use(expert) as model:
                forward(model)
    assert (graph_count(), blocks.notes) == (1, [])
    blocks.remove()


def test_8_bits_of_a_wide_bake_are_rounded_from_whole_tensors(
    placed: Callable[..., Placed], parts: Any, disk: Disk, twins: Path
) -> None:
    """Experts first, each whole and rounded before the next; the VAE comes after them, and is not rounded."""
    made = placed(replace(CPU, precision="fp8"))
    for expert, name in EXPERTS.items():
        with made.experts.use(expert) as model:
            wanted = by_the_library(name, twins)
            to_eight_bits(wanted, parts.profile.component(name), "fp8")
            narrow(wanted, "fp8", "cpu")
            assert torch.equal(forward(model), forward(wanted))
    assert_equal(made.vae, by_the_library("vae", twins))
    read = [path.parent.name for path in dict.fromkeys(path for path, _, _ in disk.reads)]
    assert read[:2] == ["transformer", "transformer_2"]
    assert {*read[2:]} == {"wan_vae", "umt5_xxl"}  # read beside each other, so either may begin


def test_failure_of_the_second_expert_is_raised_by_the_job_that_waits_for_it(
    placed: Callable[..., Placed], disk: Disk, twins: Path
) -> None:
    low = file_of(twins, "wan22_i2v_svi/transformer_2")
    disk.fails = lambda path, _: path == low
    made = placed()
    with made.attended(Progress()):
        with made.experts.use("high") as model:
            forward(model)
        with pytest.raises(WeightsCorrupt, match="cannot be read"), made.experts.use("low") as model:
            forward(model)
    assert readers() == []


def test_cancel_ends_a_wait_for_an_expert(placed: Callable[..., Placed], disk: Disk, twins: Path) -> None:
    low = file_of(twins, "wan22_i2v_svi/transformer_2")
    disk.held = lambda path, _: path == low
    disk.gate.clear()
    made = placed()
    progress = Progress()
    threading.Timer(0.1, progress.cancelled.set).start()
    with pytest.raises(Cancelled), made.attended(progress), ExitStack() as stack:
        stack.callback(disk.gate.set)  # after the wait, and before the readers are waited for
        forward(stack.enter_context(made.experts.use("low")))
    assert readers() == []


def test_unload_while_weights_come_stops_them(placed: Callable[..., Placed], disk: Disk, twins: Path) -> None:
    low = file_of(twins, "wan22_i2v_svi/transformer_2")
    disk.held = lambda path, _: path == low
    disk.gate.clear()
    made = placed()
    stop = made.arrival._work.halt

    def halt() -> None:
        stop()
        disk.gate.set()  # the reader is let go when it has been told, and not before

    made.arrival._work.halt = halt
    made.unload()
    assert readers() == []
    assert sum(count for path, _, count in disk.reads if path == low) < data_bytes(low)


def test_damaged_file_fails_the_placing_and_leaves_no_thread(twins: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(twins, tmp_path / "twins"))
    of = locate(PROFILES["wan22_i2v_svi"], Settings(weights_dir=root)).parts()
    file = file_of(root, "wan22_i2v_svi/transformer_2")
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(WeightsCorrupt, match="ends elsewhere than its tensors"):
        place(of.profile, of, CPU, EXPERTS)
    assert readers() == []


def test_published_files_are_not_read_by_us(twins: Path, tmp_path: Path) -> None:
    """Without our bake's record the folder counts as published: other names, shards and dtypes are the library's."""
    shutil.copytree(twins / "shared/wan_vae", tmp_path / "vae")
    (tmp_path / "vae/component.json").unlink()
    profile = PROFILES["wan22_i2v_svi"]
    of = FolderParts(profile, {"vae": tmp_path / "vae"})
    assert of.skeleton("vae", "cpu") is None
    assert_equal(of.load("vae"), by_the_library("vae", twins))


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_8_bit_bake_is_read_as_the_present_way_reads_it(precision: str, name: str, twins: Path, tmp_path: Path) -> None:
    """Drawn at random: a twin's 8-bit bake is another test's business, and its bytes are as good as any."""
    profile = PROFILES["wan22_i2v_svi"].baked_in(precision)
    write_bake(profile, tmp_path, twins, is_small=True)
    folder = tmp_path / profile.component(name).folder
    of = FolderParts(profile, {name: folder})
    ours = of.load(name)
    (folder / "component.json").unlink()  # now it counts as published
    assert of.skeleton(name, "cpu") is None
    assert_equal(ours, of.load(name))
    assert any(tensor.dtype == KINDS[precision].dtype for tensor in tensors(ours).values())
