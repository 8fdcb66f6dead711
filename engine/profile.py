"""The types of a profile: where a model's weights come from, and every number of how it is run.

A row is data. The bake reads sources and LoRAs, the worker reads schedule, phases and placement; nothing is
written twice. Nothing here imports torch: a bad request must not wait for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

PRECISIONS = ("bf16", "fp8", "int8")
"""What a video model can be baked in, in the order in which the worker looks for it. bf16: as published, so SDXL's
fp16 and the VAEs' fp32 are in every bake."""

EIGHT_BITS = ("fp8", "int8")

EXPERTS: Mapping[str, str] = MappingProxyType({"high": "transformer", "low": "transformer_2", "single": "transformer"})
"""A phase's or LoRA's expert -> the component that holds it."""


@dataclass(frozen=True)
class Source:
    """A Hugging Face repository. `revision` is a branch until the lock file names the commit."""

    repo: str
    revision: str = "main"


@dataclass(frozen=True)
class Component:
    """One part of a model: where it is published, where it lies after the bake, and in which dtype."""

    name: str
    library: Literal["diffusers", "transformers"]
    class_name: str
    source: Source
    subfolder: str
    """Inside the repository; '' is its root."""
    folder: str
    """Relative to the weights folder. Two profiles that name one folder share what is in it."""
    published: str | None = None
    """Name of the published configuration in engine/published; None for tokenizers, which are only copied."""
    dtype: Literal["bf16", "fp16", "fp32", "fp8", "int8"] | None = None
    """As baked; None for what holds no tensors. fp8 and int8 name the linear layers' weights: all else is bf16."""
    keep_fp32: tuple[str, ...] = ()
    """Module names whose parameters stay fp32, as the library itself keeps them when it loads in bf16."""
    variant: str | None = None
    """The published file's infix, as in model.fp16.safetensors."""
    prefix: str = ""
    """Stands before every published tensor name; newer transformers releases dropped it from the class."""
    tied: tuple[tuple[str, str], ...] = ()
    """(tensor name, the name it shares its storage with): stored once, under the second."""
    size_bytes: int = 0
    """All tensors as baked. Counted from the published configuration on the meta device; a test holds it."""
    narrow_size_bytes: int = 0
    """The same in 8 bits, fp8 and int8 alike; 0: the component has no 8-bit form. See engine/eight_bits.py."""


@dataclass(frozen=True)
class Lora:
    """A low-rank update that the bake merges into one expert."""

    source: Source
    file: str
    expert: Literal["high", "low"]
    strength: float
    sha256: str | None = None
    """None until somebody has looked it up; the lock file holds it then."""


@dataclass(frozen=True)
class Phase:
    """A run of steps with one expert and one guidance scale; scale 1 costs no second forward."""

    expert: Literal["high", "low", "single"]
    """single where the model has one transformer."""
    guidance_scale: float


@dataclass(frozen=True)
class Schedule:
    solver: str
    """euler (the reference grid linspace(1, 0.001, steps), shifted), euler_distilled (linspace(1, 0, steps + 1) without
    its 0, shifted), unipc, or a name of worker-sdxl's."""
    steps: int
    flow_shift: float | None = None
    """sigma -> s * sigma / (1 + (s - 1) * sigma); None where the model is no flow model."""
    switch_threshold: float | None = None
    """The first step with timestep <= this begins the second phase."""
    train_timesteps: int = 1000


@dataclass(frozen=True)
class Placement:
    """Where a component's bytes are on a 48 GB card, 44.5 GiB of it usable.

    card: stays. visits: there while it works, else in host memory. swaps: takes turns with the first expert.
    """

    component: str
    where: Literal["card", "visits", "swaps"]


@dataclass(frozen=True)
class Profile:
    """A model as it is run."""

    name: str
    backend: str
    modes: tuple[str, ...]
    folder: str
    """Of the bake. Profiles that differ only in how they run share it."""
    components: tuple[Component, ...]
    schedule: Schedule
    phases: tuple[Phase, ...]
    placement: tuple[Placement, ...]
    work_bytes: int
    """Activations and buffers at the largest default size, measured or estimated; see docs/performance.md."""
    narrow_work_bytes: int
    """The same with 8-bit transformers, beside which the VAE decodes in bf16."""
    size_multiple: int
    min_side: int
    max_area: int
    """Pixels of the default size: what a picture's aspect is fitted to."""
    height: int
    width: int
    frames: int = 1
    max_frames: int = 1
    """Of one clip. Longer films are chains of clips."""
    fps: int | None = None
    loras: tuple[Lora, ...] = ()
    layout: str | None = None
    """How start, anchor and end enter the condition, by name; None: the pipeline's own way."""
    negative_prompt: str = ""
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Published values with no field of their own, kept under their published names."""

    def component(self, name: str) -> Component:
        """The component called `name`.

        Raises:
            KeyError: this profile has none.
        """
        for component in self.components:
            if component.name == name:
                return component
        raise KeyError(f"{self.name} has no component {name}")

    def loras_of(self, component: Component) -> tuple[Lora, ...]:
        """The LoRAs that the bake merges into `component`."""
        return tuple(lora for lora in self.loras if EXPERTS[lora.expert] == component.name)

    def baked_in(self, precision: str) -> "Profile":
        """The profile as a bake in `precision` has it: itself for bf16, and where nothing of it can be rounded.

        What is rounded lies in folders of its own, and so does the manifest; what is not is shared with the bf16 bake.
        """
        if precision not in EIGHT_BITS or not any(part.narrow_size_bytes for part in self.components):
            return self
        parts = tuple(self._rounded(part, precision) for part in self.components)
        return replace(self, folder=f"{self.folder}-{precision}", components=parts)

    def _rounded(self, part: Component, precision: str) -> Component:
        if not part.narrow_size_bytes:
            return part
        own = part.folder.removeprefix(f"{self.folder}/")
        folder = f"{part.folder}-{precision}" if own == part.folder else f"{self.folder}-{precision}/{own}"
        dtype: Literal["fp8", "int8"] = "fp8" if precision == "fp8" else "int8"
        return replace(part, dtype=dtype, folder=folder, size_bytes=part.narrow_size_bytes, narrow_size_bytes=0)

    @property
    def precision(self) -> str:
        """What its largest component is baked in: bf16, fp16, fp8 or int8."""
        return str(max(self.components, key=lambda part: part.size_bytes).dtype)

    @property
    def is_twin(self) -> bool:
        """Whether this is the tiny stand-in with random weights; its results say so by the profile's name."""
        return self.name.startswith("tiny/")

    @property
    def size_bytes(self) -> int:
        """All tensors of the bake, shared ones included."""
        return sum(component.size_bytes for component in self.components)

    @property
    def vram_gib(self) -> float:
        """Peak on the card: what stays, plus the larger of the activations and the largest visitor."""
        sizes = {component.name: component.size_bytes for component in self.components}
        stays = sum(sizes[row.component] for row in self.placement if row.where == "card")
        visitors = [sizes[row.component] for row in self.placement if row.where == "visits"]
        return (stays + max([self.work_bytes, *visitors])) / 2**30
