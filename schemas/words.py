"""How a caller's values and names are repeated to him: short, printable, on one line."""

import difflib
from collections.abc import Iterable

MAX_SHOWN = 40  # characters


def shown(value: object) -> str:
    """A value for an error's "got ..."."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, str):
        return f'"{printable(value)}"' if len(value) <= MAX_SHOWN else f"a string of {len(value)} characters"
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 64 else "a huge number"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, dict) else "no JSON value"


def printable(text: str) -> str:
    """`text` cut to MAX_SHOWN characters, with everything unprintable escaped."""
    cut = text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in cut)


def either(choices: Iterable[str], last: str = "or") -> str:
    """'a', 'a or b', 'a, b or c'."""
    *rest, final = choices
    return f"{', '.join(rest)} {last} {final}" if rest else final


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` was most likely meant to be, if any is near."""
    folded = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word[: 2 * MAX_SHOWN].lower(), folded, n=1)
    return folded[close[0]] if close else None
