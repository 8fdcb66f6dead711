"""The kinds of value a request holds: what each accepts, and the sentence that refuses the rest.

JSON's types are taken as they are: a boolean is no number, a string is no number, 25.0 is no whole number.
A whole number does stand where a fraction may. Nothing is rounded, trimmed or normalised.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from schemas.words import shown

MAX_TEXT = 5_000  # characters; UMT5 reads 512 tokens and CLIP 77, so nothing beyond is ever read
MAX_URL = 8_192  # characters; signed URLs stay below 3,000
MAX_MEDIA = 64 * 2**20  # characters of base64; the platform's limits and WORKER_FETCH_MAX_MIB are lower
MAX_SEED = 2**63 - 1  # torch takes up to 2**64 - 1; the rest is room for a chain's seed + 42 * clip
MAX_SIDE = 4_096  # pixels
MAX_FRAMES = 1_221  # 16 clips of 81 frames, 5 of each but the first dropped at its seam
MAX_STRENGTH = 10.0  # published LoRA strengths lie within 0 to 2; beyond this the result is noise

_CONTROLS = "".join(chr(code) for code in (*range(32), 127) if chr(code) not in "\t\n\r")
_UNPRINTABLE = re.compile(f"[{re.escape(_CONTROLS)}\ud800-\udfff]")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):")
_STRENGTH = re.compile(r"-?(\d{1,3}(\.\d{0,20})?|\.\d{1,20})", re.ASCII)


@dataclass(frozen=True)
class Media:
    """Marks a field whose text stands for something else: a "picture", a "video" or a "latent"."""

    kind: str


@dataclass(frozen=True)
class Private:
    """Marks a field whose text is never repeated in an error."""


@dataclass(frozen=True)
class Grid:
    """Whole numbers `first`, `first + step`, ... up to `last`."""

    first: int
    last: int
    step: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        described = handler(schema)
        described.update(minimum=self.first, maximum=self.last)
        if self.first % self.step == 0:  # JSON Schema has no word for 4k + 1; the description says it
            described["multipleOf"] = self.step
        return described

    def check(self, value: int) -> int:
        if not self.first <= value <= self.last:
            raise wrong(f"must be {self} from {self.first} to {self.last}, got {shown(value)}")
        below = value - (value - self.first) % self.step
        if below != value:
            raise wrong(f"must be {self}, got {value}; the nearest are {below} and {below + self.step}")
        return value

    def __str__(self) -> str:
        offset = self.first % self.step
        return f"{self.step}k + {offset}" if offset else f"a multiple of {self.step}"


@dataclass(frozen=True)
class Entries:
    """A list of 1 to `most` entries. It becomes a tuple, so that a frozen request is frozen all through.

    The number is looked at first: otherwise each of a million wrong entries would earn a sentence of its own.
    """

    most: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "minItems": 1, "maxItems": self.most}

    def check(self, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        if not 1 <= len(value) <= self.most:
            raise wrong(f"must hold {self}, got {len(value)}")
        return tuple(value)

    def __str__(self) -> str:
        return f"1 to {self.most} entries" if self.most > 1 else "1 entry"


def wrong(sentence: str) -> PydanticCustomError:
    """The error of a validator that knows the whole sentence itself."""
    return PydanticCustomError("sentence", "{sentence}", {"sentence": sentence})


def side_problems(**sides: object) -> dict[str, str]:
    """What is wrong with each side of a video: name -> sentence."""
    found: dict[str, str] = {}
    for name, side in sides.items():
        if type(side) is not int:
            found[name] = f"must be a whole number, got {shown(side)}"
            continue
        try:
            VIDEO_SIDES.check(side)
        except PydanticCustomError as error:
            found[name] = error.message()
    return found


def _plain(text: str) -> str:
    """Refuse what no prompt or address needs and some tokenizer, header or log chokes on."""
    if text.isascii() and not any(control in text for control in _CONTROLS):  # a picture's megabyte: 6.5 ms -> 0.5
        return text
    found = _UNPRINTABLE.search(text)
    if found:
        code = ord(found.group())
        kind = "half of a surrogate pair" if code >= 0xD800 else "a control character"
        raise wrong(f"holds {kind} (U+{code:04X}) at position {found.start()}; remove it")
    return text


def _media(text: str) -> str:
    """Look at the form only. Whether it can be read is for the one who reads it."""
    scheme = _SCHEME.match(text)
    name = scheme.group(1).lower() if scheme else None
    if name == "sha256":
        raise wrong("holds only the hash that `effective` shows; put the media itself back in")
    if name not in (None, "http", "https", "data"):
        raise wrong("must be an http(s) URL, a data URI or base64, not another kind of address")
    if name in ("http", "https") and len(text) > MAX_URL:
        raise wrong(f"must be a URL of at most {MAX_URL} characters, got {len(text)}")
    return text


def _size(text: str) -> str:
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if not found:
        raise wrong(f'must be width x height in pixels, such as "832x480", got {shown(text)}')
    width, height = (int(side) for side in found.groups())
    problems = [f"{name} {why}" for name, why in side_problems(width=width, height=height).items()]
    if problems:
        raise wrong("; ".join(problems))
    return f"{width}x{height}"


def _strengths(value: object) -> object:
    """Bring "1;0 0;1", [1, "1;0"] and the like to one form: a tuple of texts, one a LoRA."""
    if isinstance(value, str):
        value = value.split()
    if isinstance(value, list | tuple):
        return tuple(repr(one) if _is_small_number(one) else one for one in ENTRIES.check(value))
    raise wrong(f'must be a string such as "1;0 0;1 1.2;0 0;1" or a list of such, got {shown(value)}')


def _is_small_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -MAX_STRENGTH <= value <= MAX_STRENGTH


def _strength(text: str) -> str:
    phases = text.split(";")
    if len(phases) > 2 or not all(_STRENGTH.fullmatch(one) for one in phases):
        raise wrong(f'must be one strength, or one for each phase as in "1.2;0", got {shown(text)}')
    if any(abs(float(one)) > MAX_STRENGTH for one in phases):
        raise wrong(f"must stay within -{MAX_STRENGTH:g} and {MAX_STRENGTH:g}, got {shown(text)}")
    return text


def _drawn(seed: int) -> int | None:
    return None if seed == -1 else seed


VIDEO_SIDES = Grid(32, 1280, 16)
ENTRIES = Entries(16)

Text = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(_plain)]
Word = Annotated[str, Field(max_length=64), AfterValidator(_plain)]
Source = Annotated[str, Field(min_length=1, max_length=MAX_MEDIA), AfterValidator(_plain), AfterValidator(_media)]
"""An http(s) URL, a data URI or bare base64. Put Media(...) beside it on the field."""
Latent = Annotated[str, Field(min_length=1, max_length=MAX_MEDIA, pattern=r"^[A-Za-z0-9+/_\-\s]+=*\s*$")]
Seed = Annotated[int, Field(ge=-1, le=MAX_SEED), AfterValidator(_drawn)]
Steps = Annotated[int, Field(ge=1, le=500)]
Guidance = Annotated[float, Field(ge=0, le=100)]
Fps = Annotated[int, Field(ge=1, le=60)]
ImageSide = Annotated[int, Grid(32, MAX_SIDE, 8)]
VideoSide = Annotated[int, VIDEO_SIDES]
ClipFrames = Annotated[int, Grid(5, 161, 4)]
ChainFrames = Annotated[int, Grid(5, MAX_FRAMES, 4)]
Overlap = Annotated[int, Grid(4, 20, 4)]
Resolution = Annotated[str, AfterValidator(_size)]
Strength = Annotated[str, AfterValidator(_strength)]
Strengths = Annotated[
    tuple[Strength, ...],
    BeforeValidator(_strengths),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": ["string", "number"]}}]}),
]
