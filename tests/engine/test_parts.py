"""A component loaded by us is the component that its library would load."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.overrides import TorchFunctionMode

from engine.parts import fill, library_class, run_dtype, stored_dtype
from engine.profile import Profile
from engine.profiles import PROFILES
from engine.published import published_model
from engine.settings import Settings
from engine.skeleton import HasSkeletons
from engine.weights import Parts, locate
from schemas.errors import WeightsCorrupt

MODELS = [
    (profile, part.name)
    for profile in (PROFILES["sdxl"], PROFILES["wan21_i2v_480p"], PROFILES["wan22_i2v_svi"])
    for part in profile.components
    if part.dtype is not None
]


def parts_of(profile: Profile, twins: Path) -> Parts:
    return locate(profile, Settings(weights_dir=twins)).parts()


def by_library(profile: Profile, name: str, twins: Path) -> Any:
    """What the library's own from_pretrained makes of our folder, in the dtype that we compute in on a CPU."""
    part = profile.component(name)
    dtype = torch.bfloat16 if part.dtype == "bf16" else torch.float32
    model = library_class(part).from_pretrained(twins / part.folder, torch_dtype=dtype, local_files_only=True)
    return model.eval()


@pytest.mark.parametrize(("profile", "name"), MODELS, ids=lambda value: getattr(value, "name", value))
def test_load_equals_the_librarys_own(profile: Profile, name: str, twins: Path) -> None:
    ours, theirs = parts_of(profile, twins).load(name), by_library(profile, name, twins)
    assert type(ours) is type(theirs)
    mine, other = (dict(model.named_parameters()) | dict(model.named_buffers()) for model in (ours, theirs))
    assert mine.keys() == other.keys()
    for key in mine:
        assert mine[key].dtype == other[key].dtype, key
        assert torch.equal(mine[key], other[key]), key


@pytest.mark.parametrize(("profile", "name"), MODELS, ids=lambda value: getattr(value, "name", value))
def test_load_gives_a_model_ready_for_inference(profile: Profile, name: str, twins: Path) -> None:
    model = parts_of(profile, twins).load(name)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cpu"}


def test_load_ties_the_text_encoders_table(twins: Path) -> None:
    model = parts_of(PROFILES["wan21_i2v_480p"], twins).load("text_encoder")
    assert model.encoder.embed_tokens.weight is model.shared.weight


def test_load_makes_a_new_object_each_time(twins: Path) -> None:
    parts = parts_of(PROFILES["sdxl"], twins)
    first = parts.load("vae")
    with torch.no_grad():
        first.encoder.conv_in.weight.zero_()
    assert parts.load("vae").encoder.conv_in.weight.abs().sum() > 0


def test_load_reads_tokenizers_processors_and_schedulers(twins: Path) -> None:
    parts = parts_of(PROFILES["wan21_i2v_480p"], twins)
    assert parts.load("tokenizer")("a red fox").input_ids[-1] == 1
    assert parts.load("image_processor").size == {"shortest_edge": 224}
    assert parts.load("scheduler").config.flow_shift == 3.0


def test_skeleton_lists_a_models_tensors_once(twins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a 14B transformer that takes 7 ms; once for each of its 1,495 tensors took a first job six seconds."""
    from diffusers import WanTransformer3DModel

    listed: list[str] = []
    list_tensors = WanTransformer3DModel.state_dict

    def counted(model: Any, *args: Any, **more: Any) -> Any:
        listed.append(type(model).__name__)
        return list_tensors(model, *args, **more)

    monkeypatch.setattr(WanTransformer3DModel, "state_dict", counted)
    parts = parts_of(PROFILES["wan22_i2v_svi"], twins)
    assert isinstance(parts, HasSkeletons)
    skeleton = parts.skeleton("transformer", "cpu")
    assert skeleton is not None
    skeleton.stream.close()
    assert listed == ["WanTransformer3DModel"]


@pytest.mark.parametrize("name", ["vae", "text_encoder", "transformer"])
def test_nothing_is_drawn_for_an_empty_model(name: str) -> None:
    """Without numbers too it takes half of the time in which a first job has nothing to read."""
    drawn: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") in {"normal_", "uniform_", "trunc_normal_"}:
                drawn.append(func.__name__)
            return func(*args, **(kwargs or {}))

    state = torch.get_rng_state()
    with Watch():
        model = published_model(PROFILES["wan22_i2v_svi"].component(name))
    assert drawn == []
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", ["vae", "text_encoder", "transformer"])
def test_weights_of_an_empty_model_take_no_memory_on_the_way(name: str) -> None:
    made: list[int] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out.is_meta:
                made.append(out.numel())
            return out

    with Watch():
        published_model(PROFILES["wan22_i2v_svi"].component(name))
    assert max(made) <= 1024 * 128  # the tables of Wan's positions, which are real


def test_other_threads_make_real_tensors_while_an_empty_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Module] = []
    build = AutoencoderKLWan.from_config

    def beside(config: Any) -> Any:
        other = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        other.start()
        other.join()
        return build(config)

    monkeypatch.setattr(AutoencoderKLWan, "from_config", beside)
    assert published_model(PROFILES["wan22_i2v_svi"].component("vae")).encoder.conv_in.weight.is_meta
    assert [parameter.is_meta for parameter in made[0].parameters()] == [False, False]


class Small(nn.Module):
    """One layer under two names, a table that no file holds, and a place for one that stays empty."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3, device="meta")
        self.again = self.layer
        self.register_buffer("kept", torch.empty(1, device="meta"))
        self.register_buffer("computed", torch.ones(4), persistent=False)
        self.register_buffer("absent", None)


TIED = replace(
    PROFILES["wan22_i2v_svi"].component("text_encoder"),
    tied=(("again.weight", "layer.weight"), ("again.bias", "layer.bias")),
)
STATE = {"layer.weight": torch.ones(3, 2), "layer.bias": torch.ones(3), "kept": torch.ones(1)}


def test_fill_takes_the_tensors_that_are_given_and_moves_what_no_file_holds() -> None:
    model = fill(Small(), TIED, STATE, "meta")
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == {
        name: STATE[name.replace("again", "layer")].data_ptr()
        for name in ("kept", "layer.weight", "layer.bias", "again.weight", "again.bias")
    }
    assert model.computed.is_meta
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({name: STATE[name] for name in ("layer.weight", "layer.bias")}, "kept is missing or of another shape"),
        ({**STATE, "layer.bias": torch.ones(1)}, r"layer\.bias is missing or of another shape"),
        ({**STATE, "spare": torch.ones(1)}, "has no spare"),
    ],
)
def test_fill_refuses_what_is_not_the_models_state(state: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fill(Small(), TIED, state, "cpu")


def test_load_refuses_a_name_that_the_profile_does_not_have(twins: Path) -> None:
    with pytest.raises(KeyError, match="transformer"):
        parts_of(PROFILES["sdxl"], twins).load("transformer")


def test_load_refuses_files_that_do_not_fit_the_configuration(twins: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(twins, tmp_path / "twins"))
    config = root / "sdxl/vae/config.json"
    text = config.read_text()
    config.write_text(json.dumps({**json.loads(text), "latent_channels": 8}).ljust(len(text))[: len(text)])
    with pytest.raises(WeightsCorrupt, match=r"vae: .* is missing or of another shape"):
        parts_of(PROFILES["sdxl"], root).load("vae")


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.float16), ("cuda:0", torch.float16)]
)
def test_fp16_runs_as_fp32_on_a_cpu_only(device: str, dtype: torch.dtype) -> None:
    assert run_dtype(PROFILES["sdxl"].component("unet"), "conv_in.weight", device) == dtype


def test_bf16_runs_as_stored_on_a_cpu() -> None:
    component = PROFILES["wan22_i2v_svi"].component("transformer")
    assert run_dtype(component, "blocks.0.attn1.to_q.weight", "cpu") == torch.bfloat16
    assert run_dtype(component, "blocks.0.norm2.weight", "cpu") == torch.float32


def test_stored_dtype_is_refused_for_what_holds_no_tensors() -> None:
    with pytest.raises(ValueError, match="tokenizer holds no tensors"):
        stored_dtype(PROFILES["sdxl"].component("tokenizer"), "x")
