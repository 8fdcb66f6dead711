"""What blocks will be called with, told before the job: equal to what the job then brings, so one graph is enough."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import profiles, weights
from engine.backends import Task
from engine.backends.wan import Wan
from engine.backends.wan_svi import WanSvi
from engine.block_inputs import block_inputs
from engine.card import Card
from engine.compiling import CompiledBlocks
from engine.conditioning import LAYOUTS
from engine.experts import RollingExperts
from engine.geometry import LatentShape
from engine.progress import Progress
from engine.settings import Settings
from engine.shadow import Specs
from engine.speed import Accelerated
from schemas.input_schema import parse_request
from tests.conftest import data_uri, photo
from tests.engine.svi_parts import picture
from tests.engine.tiny_wan import make_wan

CPU = torch.device("cpu")


class Announced(CompiledBlocks):
    """Remembers how many tokens were announced, and how many graphs there were then."""

    def __init__(self, models: list[Any]) -> None:
        super().__init__(models, backend="eager", patience_s=120.0)
        self.tokens: list[int] = []
        self.graphs = self.saves = 0

    def save(self) -> bool:
        self.saves += 1
        return super().save()

    def expect(self, args: tuple[Specs, ...]) -> None:
        super().expect(args)
        self.tokens.append(args[0].shape[1])
        self.graphs = len(self._graphs)


def accelerated(backend: Any, names: tuple[str, ...]) -> Announced:
    """The backend with compiled blocks, as it would be on a card; each size that is met begins a graph."""
    torch._dynamo.reset()
    models = [backend._placed.experts._models[name] for name in names]
    blocks = Announced(models)
    backend._placed = replace(backend._placed, accelerated=Accelerated("native", blocks, (), models[0]))
    return blocks


def run(backend: Any, task: Task) -> None:
    for _ in backend.generate(task, Progress()).chunks:
        pass


@pytest.fixture(scope="module")
def svi(twins: Path) -> tuple[WanSvi, Announced]:
    profile = profiles.PROFILES["wan_2_2_i2v_lightning_svi_3_3"]
    parts = weights.locate(profile, Settings(weights_dir=twins)).parts()
    backend = WanSvi(parts.profile, parts, Card("cpu", 2**40))
    return backend, accelerated(backend, ("high", "low"))


def svi_task(backend: WanSvi, layout: str, **fields: Any) -> Task:
    pictures = {"image_start": picture(1, 32, 32)}
    if LAYOUTS[layout].needs_end:
        pictures["image_end"] = picture(2, 32, 32)
    payload = {
        "mode": "svi_endframe", "prompt": "a red fox", "resolution": "32x32", "video_length": 13, "layout": layout,
        **dict.fromkeys(pictures, "data:,x"), **fields,
    }  # fmt: skip
    return Task(backend.profile, parse_request(payload), 7, pictures)


@pytest.mark.parametrize(("layout", "policy"), [*((layout, "exact") for layout in LAYOUTS), ("svi_latent", "window")])
def test_svi_job_brings_the_sizes_that_it_announced(svi: tuple[WanSvi, Announced], layout: str, policy: str):
    backend, blocks = svi
    saves = blocks.saves
    run(backend, svi_task(backend, layout, frame_policy=policy))
    assert blocks.saves == saves + 1  # after the last frame
    assert blocks.graphs == len(blocks._graphs)
    assert blocks.account.eager_forwards == 0
    assert blocks.notes == []


def test_chain_announces_every_size_of_its_clips(svi: tuple[WanSvi, Announced]):
    backend, blocks = svi
    blocks.tokens.clear()
    run(backend, svi_task(backend, "svi_latent", video_length=29, segments=2))
    assert blocks.tokens == [20, 24]
    assert blocks.graphs == len(blocks._graphs)
    assert blocks.account.eager_forwards == 0


def test_wan21_job_brings_the_size_that_it_announced_picture_tokens_included(twins: Path):
    parts = weights.locate(profiles.PROFILES["wan21_i2v_480p"], Settings(weights_dir=twins)).parts()
    wan = Wan(parts.profile, parts, Card("cpu", 2**40))
    blocks = accelerated(wan, ("single",))
    shown = photo(128, 160)
    payload = {"mode": "video", "prompt": "a fox runs", "height": 64, "width": 96, "num_frames": 9}
    request = parse_request({**payload, "num_inference_steps": 2, "image_url": data_uri(shown)})
    run(wan, Task(wan.profile, request, 7, {"image_url": shown}))
    assert wan._placed.image_tokens > 1
    assert blocks.graphs == len(blocks._graphs) == blocks.ready == 1
    assert blocks.account[2:] == (0.0, 4.0)
    assert blocks.saves == 1


def test_expectation_that_is_wrong_costs_a_graph_and_no_job():
    """The negative of the tests above: they would see a size that was announced wrongly."""
    model = make_wan(0, layers=1)
    blocks = CompiledBlocks([model], backend="eager", patience_s=120.0)
    with torch.inference_mode():
        blocks.expect(block_inputs(model, LatentShape(3, 4, 4), CPU))
        model(torch.randn(1, 36, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 512, 32))
    blocks.wait()
    assert blocks.ready == 2


def test_asking_disturbs_no_hook_and_no_expert():
    """Hooks of the swap and of arriving weights wait and copy: a question must not."""
    model = make_wan(0, layers=2)
    called = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: called.append(1))
        module.register_forward_hook(lambda *_: called.append(1))
    block_inputs(model, LatentShape(2, 4, 4), CPU)
    assert called == []
    experts = RollingExperts({"high": make_wan(0), "low": make_wan(1)}, "cpu")
    with experts.use("high", forwards=1):
        before = experts.bytes_moved
        block_inputs(experts.model, LatentShape(2, 4, 4), CPU)
        assert experts.bytes_moved == before


def test_full_size_is_answered_from_shapes_alone():
    with torch.device("meta"):
        model = make_wan(0, layers=1)
    args = block_inputs(model, LatentShape(22, 60, 60), torch.device("cuda", 0))
    assert args[0].shape == (1, 19800, 32)
    assert {spec.device for spec in args[:3]} == {torch.device("cuda", 0)}


def test_model_without_picture_embedding_refuses_picture_tokens():
    with pytest.raises(ValueError, match="257 image tokens"):
        block_inputs(make_wan(0, layers=1), LatentShape(2, 4, 4), CPU, image_tokens=257)
