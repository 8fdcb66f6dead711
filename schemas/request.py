"""What every mode's request shares: null, aliases, rules across fields, warnings, fields that hold media."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, model_validator

from schemas.errors import Problem
from schemas.fields import Media


class Rule(NamedTuple):
    """A rule across fields. `check` takes the request and says what is wrong with the first, or None."""

    fields: tuple[str, ...]
    check: Callable[[Any], str | None]


class BrokenRules(ValueError):
    """Fields that are each fine and do not go together."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = tuple(problems)


class Request(BaseModel):
    """A request as the worker takes it. `null` means the default, in every field."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    ALIASES: ClassVar[Mapping[str, str]] = {}
    """Further names that are accepted -> the field each stands for."""
    RULES: ClassVar[tuple[Rule, ...]] = ()

    mode: str
    if TYPE_CHECKING:  # each mode declares it in its own place: fields are shown in the order of declaration
        seed: int | None

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, values: object) -> object:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        problems = list(self.broken_rules())
        if problems:
            raise BrokenRules(problems)
        return self

    @classmethod
    def names(cls) -> list[str]:
        """Every name a payload may use: the fields, then the aliases."""
        return [*cls.model_fields, *cls.ALIASES]

    @classmethod
    def canonical(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
        """Put each alias under the field it stands for.

        Returns the values under canonical names, the name the caller used for each renamed field, and what is
        wrong: a field given under two names.
        """
        renamed: dict[str, str] = {}
        problems: list[Problem] = []
        found = dict(values)
        for alias, name in cls.ALIASES.items():
            if alias not in found:
                continue
            value = found.pop(alias)
            if name in found:
                other = renamed.get(name, name)
                problems.append(Problem(alias, f"means the same as {other}, which is given too; keep one"))
            else:
                found[name] = value
                renamed[name] = alias
        return found, renamed, problems

    def broken_rules(self, unknown: frozenset[str] = frozenset()) -> Iterator[Problem]:
        """Everything wrong across fields. Rules that look at a field in `unknown` are left out."""
        for fields, check in self.RULES:
            sentence = check(self) if unknown.isdisjoint(fields) else None
            if sentence:
                yield Problem(fields[0], sentence)

    def given(self, *names: str) -> list[str]:
        """Those of `names` that the caller set; null does not count."""
        return [name for name in names if name in self.model_fields_set]

    def changed(self, *names: str) -> list[str]:
        """Those of `names` that the caller set to something else than the default."""
        defaults = type(self).model_fields
        return [name for name in self.given(*names) if getattr(self, name) != defaults[name].default]

    def warnings(self) -> list[str]:
        """What the caller should know about a request that is legal: fields without effect, first of all."""
        return []

    def explicit(self) -> dict[str, Any]:
        """Every field by name, as plain JSON that makes the same request again."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def filled(self, values: Mapping[str, Any]) -> Self:
        """This request with `values` in the fields that are None, checked again.

        For what a profile or a picture decides. What the caller gave stands, and `given` still tells.

        Raises:
            pydantic.ValidationError: the values break the contract.
        """
        open_ones = {name: value for name, value in values.items() if getattr(self, name) is None}
        given = {name: getattr(self, name) for name in self.model_fields_set}  # a default is no word of the caller
        whole = type(self).model_validate({**given, **open_ones})
        return type(self).model_construct(_fields_set=set(self.model_fields_set), **dict(whole))


def is_media(request: type[Request], name: str, kind: str | None = None) -> bool:
    """Whether a field holds media, of one kind or of any."""
    marks = [mark for mark in request.model_fields[name].metadata if isinstance(mark, Media)]
    return any(kind in (None, mark.kind) for mark in marks)


def media_fields(request: Request, kind: str) -> dict[str, str | list[str]]:
    """The given fields that hold media of one kind ("picture", "video", "latent"), with their texts."""
    names = [name for name in type(request).model_fields if is_media(type(request), name, kind)]
    texts = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    return {name: list(text) if isinstance(text, tuple) else text for name, text in texts.items()}


def picture_fields(request: Request) -> dict[str, str | list[str]]:
    """The pictures of a request by field: URL, data URI or base64; a list where the caller gave a list."""
    return media_fields(request, "picture")
