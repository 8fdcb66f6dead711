"""Building components from folders: one way for a tiny twin, our bake and a repository as published."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from engine.eight_bits import to_eight_bits
from engine.linear8 import KINDS
from engine.lora import LoraWeights, load_lora
from engine.profile import EIGHT_BITS, Component, Lora, Profile
from engine.stack import build_stack
from engine.tensorfile import DTYPES, Stored, TensorFiles, read_offsets, weight_files
from engine.tokenizer import read_ready
from schemas.errors import WeightsCorrupt

if TYPE_CHECKING:
    from engine.readahead import ReadAhead
    from engine.skeleton import Skeleton


@dataclass(frozen=True)
class FolderParts:
    """The Parts of a profile whose components lie in `folders`."""

    profile: Profile
    folders: Mapping[str, Path]
    loras: Path | None = None
    """The folder with the profile's LoRA files, if the bake kept them."""
    ahead: "ReadAhead | None" = None
    """Reads the files into the system's memory; see engine.arrival.Arrival.follow. Whoever calls `load` stops it."""

    @property
    def keeps_loras(self) -> bool:
        """Whether `load_lora` finds anything."""
        return self.loras is not None

    def load_lora(self, lora: Lora) -> LoraWeights:
        """Read one of the profile's LoRA files.

        Raises:
            KeyError: the bake kept none. WeightsCorrupt: the file is no LoRA.
        """
        if self.loras is None:
            raise KeyError(f"no LoRA files are kept beside {self.profile.folder}")
        return load_lora(self.loras / f"{self.profile.loras.index(lora)}.safetensors")

    def load(self, name: str, device: str = "cpu") -> Any:
        """Build the component `name`; see engine.weights.Parts."""
        component = self.profile.component(name)
        folder = self.folders[name]
        if component.dtype is None:
            ready = read_ready(folder)
            return library_class(component).from_pretrained(folder, local_files_only=True) if ready is None else ready
        if self.ahead is not None:
            self.ahead.stop()
        found = self.skeleton(name, device)
        if found is not None:
            return found.whole(device)
        model = empty_frame(component, read_config(component, folder))
        files = TensorFiles(folder, published_variant(folder, component))
        return fill(model, component, _read_state(model, component, files, device), device)

    def skeleton(self, name: str, device: str) -> "Skeleton | None":
        """See engine.skeleton.HasSkeletons. None for what our bake did not write, or wrote in another dtype.

        Raises:
            WeightsCorrupt: the file is damaged or does not fit the class.
        """
        from engine.skeleton import Skeleton  # here, because the bake imports this module and reads otherwise

        component, folder = self.profile.component(name), self.folders[name]
        files = weight_files((path.name for path in folder.iterdir()), None)
        if component.dtype is None or len(files) != 1 or not is_baked(folder):
            return None
        model = empty_frame(component, read_config(component, folder))
        # Once: 1,495 of them take milliseconds to list, and asked for one by one, seconds. The model's own, to be cast.
        tensors = model.state_dict(keep_vars=True)
        stream = (folder / files[0]).open("rb", buffering=0)
        try:
            places = read_offsets(stream)
            stored = None if places is None else _places(tensors, component, places)
        except BaseException:
            stream.close()
            raise
        if stored is None:
            stream.close()
            return None
        for key in stored:
            if tensors[key].dtype != (dtype := run_dtype(component, key, device)):
                tensors[key].data = tensors[key].data.to(dtype)
        tie(model, component)
        return Skeleton(component, model, stream, stored)


def library_class(component: Component) -> Any:
    """The class that the component is an instance of."""
    return getattr(import_module(component.library), component.class_name)


def read_config(component: Component, folder: Path) -> Any:
    """The component's config.json as its library reads it: diffusers' is a dict, transformers' an object."""
    cls = library_class(component)
    if component.library == "diffusers":
        return cls.load_config(folder, local_files_only=True)
    return cls.config_class.from_pretrained(folder, local_files_only=True)


def empty_model(component: Component, config: Any) -> Any:
    """The model with parameters on the meta device, taking no memory; buffers that no file holds are real.

    Nothing is drawn for parameters: without numbers it still takes as long as all the rest, or twice that.
    """
    cls = library_class(component)
    with _NoValues(), _nothing_drawn(component):
        model = cls.from_config(config) if component.library == "diffusers" else cls(config)
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:  # ones or zeros
            _put(model, name, nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad))
    return model


class _NoValues(TorchFunctionMode):
    """Inside, what this thread would make with whatever values, or draw, is on the meta device.

    Not what other threads make, as a change of `torch.empty` or `nn.Module` would: those that read weights make their
    buffers meanwhile. What was drawn is not divided: on the meta device that imports torch's compiler.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is torch.Tensor.div and args[0].is_meta:
            return args[0]
        return func(*args, **({**given, "device": "meta"} if func in (torch.empty, torch.randn) else given))


def _nothing_drawn(component: Component) -> AbstractContextManager[None]:
    """Inside the block its library draws no numbers for parameters."""
    if component.library == "diffusers":
        from diffusers.models import modeling_utils

        return modeling_utils.no_init_weights()
    from transformers import initialization

    return initialization.no_init_weights()


def empty_frame(component: Component, config: Any) -> Any:
    """`frame` of an `empty_model`."""
    return build_stack(component.class_name, config, lambda built: frame(component, empty_model(component, built)))


def frame(component: Component, model: Any) -> Any:
    """An empty model as the component is baked: its linear layers 8-bit ones, where that is how. Returns `model`."""
    if component.dtype in EIGHT_BITS:
        to_eight_bits(model, component, component.dtype)
    return model


def stored_dtype(component: Component, name: str) -> torch.dtype:
    """The dtype in which the tensor `name` is baked."""
    if not set(component.keep_fp32).isdisjoint(name.split(".")):
        return torch.float32
    if component.dtype is None:
        raise ValueError(f"{component.name} holds no tensors")
    if component.dtype not in EIGHT_BITS:
        return DTYPES[component.dtype]
    return {"weight_q": KINDS[component.dtype].dtype, "weight_scale": torch.float32}.get(
        name.rpartition(".")[2], torch.bfloat16
    )


def run_dtype(component: Component, name: str, device: str) -> torch.dtype:
    """The dtype in which it computes: as stored, but fp32 for fp16 on a CPU, which has no fast fp16."""
    dtype = stored_dtype(component, name)
    return torch.float32 if dtype == torch.float16 and torch.device(device).type == "cpu" else dtype


def file_name(component: Component, name: str, known: set[str]) -> str:
    """The name in the files of the model's tensor `name`; `known`: the names in the files."""
    return name if name in known else component.prefix + name


def published_variant(folder: Path, component: Component) -> str | None:
    """The bake writes no variant; a cached repository has the one it was published with."""
    return component.variant if not is_baked(folder) else None


def is_baked(folder: Path) -> bool:
    """Whether our bake wrote the component in `folder`, and not its publisher."""
    return (folder / "component.json").is_file()


def fill(model: Any, component: Component, state: Mapping[str, torch.Tensor], device: str) -> Any:
    """Give an empty model its tensors, without a copy, and make it ready for inference on `device`; returns it.

    `state`: on `device`, all that a file holds. In one walk: `load_state_dict`, `to` and `requires_grad_` take six
    times as long, and a first job waits for it.

    Raises:
        ValueError: `state` lacks a tensor, or has one more, or one of another shape.
    """
    left = {**state, **{name: state[source] for name, source in component.tied}}

    def taken(name: str, empty: torch.Tensor) -> torch.Tensor:
        if name not in left or left[name].shape != empty.shape:
            raise ValueError(f"{component.name}: {name} is missing or of another shape")
        return left.pop(name)

    for path, module in model.named_modules(remove_duplicate=False):
        prefix = path and f"{path}."
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(taken(prefix + name, parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                is_stored = name not in module._non_persistent_buffers_set
                module._buffers[name] = taken(prefix + name, buffer) if is_stored else buffer.to(device)
    if left:
        raise ValueError(f"{component.name} has no {', '.join(left)}")
    tie(model, component)
    return model.eval()


def tie(model: Any, component: Component) -> None:
    """Make one parameter under two names of those that share storage: it is laid out once, and moved once."""
    for name, source in component.tied:
        _put(model, name, model.get_parameter(source))


def _put(model: Any, name: str, tensor: torch.Tensor) -> None:
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, tensor)


def _places(
    tensors: Mapping[str, torch.Tensor], component: Component, places: Mapping[str, Stored]
) -> dict[str, Stored] | None:
    """The model's tensors -> where the file has them; None if one is not stored as the bake stores it."""
    known, tied = set(places), dict(component.tied)
    stored = {}
    for name, empty in tensors.items():
        if name in tied:
            continue
        key = file_name(component, name, known)
        if key not in known or places[key].shape != tuple(empty.shape):
            raise WeightsCorrupt(f"{component.name}: {key} is missing or of another shape; bake it again")
        stored[name] = places[key]
    return stored if all(place.dtype == stored_dtype(component, name) for name, place in stored.items()) else None


def _read_state(model: Any, component: Component, files: TensorFiles, device: str) -> dict[str, torch.Tensor]:
    """The model's tensors from its files, each cast and moved on its own."""
    known, tied = set(files.names()), dict(component.tied)
    state = {}
    for name, empty in model.state_dict().items():
        if name in tied:
            continue
        stored = file_name(component, name, known)
        if stored not in known or files.shape(stored) != tuple(empty.shape):
            raise WeightsCorrupt(f"{component.name}: {stored} is missing or of another shape; bake it again")
        state[name] = files.tensor(stored).to(device=device, dtype=run_dtype(component, name, device))
    return state
