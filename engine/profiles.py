"""The table of profiles, and which one a request means."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from engine.profile import EXPERTS, Component, Lora, Phase, Placement, Profile, Schedule, Source
from engine.profiles_sdxl import SDXL
from engine.profiles_wan import ENDFRAME, SVI_3_3, WAN21_I2V_480P, WAN22_I2V_LIGHTNING, WAN22_I2V_SVI
from schemas.errors import InvalidInput, Problem

if TYPE_CHECKING:
    from schemas.input_schema import Request

__all__ = [
    "BAKES", "BUDGET_BYTES", "EXPERTS", "PROFILES", "Component", "Lora", "Phase", "Placement", "Profile",
    "Schedule", "Source", "resolve",
]  # fmt: skip

BUDGET_BYTES = 70 * 10**9  # of one image: RunPod's builder stops at 80 GB, torch and the system take their share

PROFILES: Mapping[str, Profile] = MappingProxyType(
    {row.name: row for row in (SDXL, WAN21_I2V_480P, WAN22_I2V_SVI, SVI_3_3, ENDFRAME, WAN22_I2V_LIGHTNING)}
)

BAKES = tuple(name for name, row in PROFILES.items() if name == row.folder)
"""The profiles that `download_weights.py` makes; the others are ways to run one of them."""

DEFAULTS = MappingProxyType({"image": SDXL, "video": WAN21_I2V_480P, "svi_endframe": SVI_3_3})
"""Mode -> profile, where the request names none."""


def resolve(request: "Request") -> Profile:
    """The profile that `request` means: its `model_type`, else its mode's own.

    Raises:
        InvalidInput: the model_type is unknown, or belongs to another mode.
    """
    mode: str = request.mode
    name: str | None = getattr(request, "model_type", None)  # only the modes with several profiles have the field
    if name is None:
        return DEFAULTS[mode]
    choices = [row.name for row in PROFILES.values() if mode in row.modes]
    if name in choices:
        return PROFILES[name]
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]}?" if near else f"{mode} has {', '.join(choices)}"
    raise InvalidInput([Problem("model_type", f"{name!r} is no profile of mode {mode}; {hint}")])
