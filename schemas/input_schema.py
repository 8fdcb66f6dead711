"""The wire contract of requests: mode -> model, and the one way from a payload to a request."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from schemas.effective import effective
from schemas.errors import InvalidInput, Problem
from schemas.image_schema import ImageRequest
from schemas.request import Request, media_fields, picture_fields
from schemas.sentences import problems_of
from schemas.svi_schema import SviEndframeRequest
from schemas.video_schema import VideoRequest
from schemas.words import either, nearest, printable, shown

__all__ = [
    "INPUT_SCHEMA", "MODE_ALIASES", "ImageRequest", "Request", "SviEndframeRequest", "VideoRequest",
    "effective", "media_fields", "parse_request", "picture_fields",
]  # fmt: skip

INPUT_SCHEMA: dict[str, type[Request]] = {
    "image": ImageRequest,
    "video": VideoRequest,
    "svi_endframe": SviEndframeRequest,
}
"""Mode -> what a request of that mode may hold."""

MODE_ALIASES: Mapping[str, str] = MappingProxyType({"video_generation": "video", "i2v": "video"})

DEFAULT_MODE = "image"

MAX_STRANGE = 20  # unknown fields that are named one by one; the rest is counted

KNOWN_ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "image_url": "image_start",
        "image": "image_url",
        "start_image": "image_start",
        "last_image": "image_end",
        "last_frame": "image_end",
        "end_image": "image_end",
        "end_image_url": "image_end",
        "anchor": "image_refs",
        "frames_per_second": "fps",
        "steps": "num_inference_steps",
        "cfg": "guidance_scale",
        "shift": "flow_shift",
        "length": "num_frames",
    }
)
"""Names that other workers and hosts use -> ours. Only for advice: none of them is accepted."""


def parse_request(payload: object) -> Request:
    """Turn what came over the wire into a request.

    Raises:
        InvalidInput: with every problem found at once. Nothing else, whatever the payload is.
    """
    if not isinstance(payload, dict):
        raise InvalidInput([Problem("", f"the input must be an object, got {shown(payload)}")])
    mode = _mode(payload.get("mode"))
    model = INPUT_SCHEMA[mode]
    known, problems = _known(payload, mode)
    values, renamed, clashes = model.canonical(known)
    request, found = _validated(model, values)
    problems += clashes
    problems += [Problem(_as_given(problem.field, renamed), problem.message) for problem in found]
    if request is None or problems:
        raise InvalidInput(problems)
    return request


def _mode(value: object) -> str:
    if value is None:
        return DEFAULT_MODE
    names = [*INPUT_SCHEMA, *MODE_ALIASES]
    if isinstance(value, str) and value in names:
        return MODE_ALIASES.get(value, value)
    near = nearest(value, names) if isinstance(value, str) else None
    hint = f"; did you mean {near}?" if near else ""
    raise InvalidInput([Problem("mode", f"must be {either(INPUT_SCHEMA)}, got {shown(value)}{hint}")])


def _known(payload: dict[Any, Any], mode: str) -> tuple[dict[str, Any], list[Problem]]:
    """The mode's own fields that are not null, and a problem for every other one."""
    names = INPUT_SCHEMA[mode].names()
    strange = [key for key in payload if not isinstance(key, str) or key not in names]
    advice = [_advice(key, mode) for key in strange[:MAX_STRANGE]]
    problems = [
        Problem(printable(key), f"is not a field of mode {mode}{meant and '; ' + meant}")
        if isinstance(key, str)
        else Problem("", f"the name of a field must be a string, got {shown(key)}")
        for key, meant in zip(strange, advice, strict=False)
    ]
    if len(strange) > MAX_STRANGE:
        problems.append(Problem("", f"{len(strange) - MAX_STRANGE} more fields are unknown"))
    if "" in advice:
        problems.append(Problem("", f"the fields of mode {mode} are {', '.join(names)}"))
    values = {key: payload[key] for key in names if key != "mode" and payload.get(key) is not None}
    return values, problems


def _advice(key: object, mode: str) -> str:
    """What the caller probably meant by a field that the mode does not have; '' if that is open."""
    if not isinstance(key, str):
        return ""
    own = INPUT_SCHEMA[mode].names()
    meant = KNOWN_ELSEWHERE.get(key, "")
    if meant in own:
        return f"did you mean {meant}?"
    for name, words in ((key, "it"), (meant, f"it as {meant}")):
        modes = [other for other in INPUT_SCHEMA if name in INPUT_SCHEMA[other].names()]
        if modes:
            return f"{either(modes, 'and')} {'has' if len(modes) == 1 else 'have'} {words}"
    near = nearest(key, own)
    return f"did you mean {near}?" if near else ""


def _validated(model: type[Request], values: dict[str, Any]) -> tuple[Request | None, list[Problem]]:
    """The request, or all that is wrong with it: each field, and the rules between those that are fine."""
    try:
        return model.model_validate(values), []
    except ValidationError as error:
        problems = problems_of(error, model)
        broken = frozenset(str(detail["loc"][0]) for detail in error.errors(include_url=False) if detail["loc"])
    if broken:
        fine: dict[str, Any] = {name: _frozen(value) for name, value in values.items() if name not in broken}
        problems += model.model_construct(**fine).broken_rules(unknown=broken)
    return None, problems


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _as_given(path: str, renamed: Mapping[str, str]) -> str:
    """The name that the caller used."""
    name, bracket, rest = path.partition("[")
    return renamed.get(name, name) + bracket + rest
