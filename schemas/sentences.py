"""From pydantic's findings to sentences: which field, what is wrong, what was got, what would be right."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from schemas.errors import Problem
from schemas.fields import Media, Private
from schemas.request import BrokenRules
from schemas.words import either, nearest, shown


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Every problem of a failed validation, in the order in which the model declares its fields."""
    found: list[Problem] = []
    for detail in error.errors(include_url=False):
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, BrokenRules):
            found += cause.problems
        else:
            found.append(_problem(detail, model))
    return found


def _problem(detail: ErrorDetails, model: type[BaseModel]) -> Problem:
    """Names of union branches are left out: the location ('image_start', 'several', 2) is image_start[2]."""
    name = str(detail["loc"][0]) if detail["loc"] else ""
    path = name + "".join(f"[{part}]" for part in detail["loc"][1:] if isinstance(part, int))
    field = model.model_fields.get(name)
    is_private = field is not None and any(isinstance(mark, Media | Private) for mark in field.metadata)
    value = detail["input"]
    got = f"a string of {len(value)} characters" if is_private and isinstance(value, str) else shown(value)
    write = _SENTENCES.get(detail["type"], _unforeseen)
    return Problem(path, write(detail.get("ctx", {}), got))


def _must(be: str) -> Callable[[Mapping[str, Any], str], str]:
    """A sentence with pydantic's own numbers in it, such as "must be at least {ge}, got 0"."""

    def sentence(ctx: Mapping[str, Any], got: str) -> str:
        plain = {key: int(one) if isinstance(one, float) and one.is_integer() else one for key, one in ctx.items()}
        return f"must {be.format(**plain)}, got {got}"

    return sentence


def _own(ctx: Mapping[str, Any], got: str) -> str:  # noqa: ARG001 one signature for all sentences
    return str(ctx["sentence"])


def _missing(ctx: Mapping[str, Any], got: str) -> str:  # noqa: ARG001 one signature for all sentences
    return "is missing"


def _choice(ctx: Mapping[str, Any], got: str) -> str:
    choices = re.findall(r"'([^']*)'", ctx["expected"])
    near = nearest(got.strip('"'), choices)
    hint = f"; did you mean {near}?" if near else ""
    return f"must be {either(choices)}, got {got}{hint}"


def _unforeseen(ctx: Mapping[str, Any], got: str) -> str:  # noqa: ARG001 one signature for all sentences
    return f"is not valid, got {got}"


_SENTENCES: dict[str, Callable[[Mapping[str, Any], str], str]] = {
    "sentence": _own,
    "missing": _missing,
    "literal_error": _choice,
    "string_type": _must("be a string"),
    "int_type": _must("be a whole number"),
    "float_type": _must("be a number"),
    "bool_type": _must("be true or false"),
    "tuple_type": _must("be a list"),
    "finite_number": _must("be a finite number"),
    "greater_than_equal": _must("be at least {ge}"),
    "less_than_equal": _must("be at most {le}"),
    "string_too_long": _must("have at most {max_length} characters"),
    "string_too_short": _must("not be empty"),
    "string_pattern_mismatch": _must("be base64"),
    "string_unicode": _must("be text without half surrogate pairs"),
}
"""pydantic's error types that this contract can meet."""
