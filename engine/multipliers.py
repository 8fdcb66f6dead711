"""LoRA strengths as a request writes them: "1.2;0" is one LoRA, a value a phase; LoRAs stand apart by spaces.

Source: the `loras_multipliers` field of Wan2GP's model definitions.
"""

import math
import re
from collections.abc import Sequence

from schemas.errors import InvalidInput, Problem

FIELD = "loras_multipliers"
MAX_STRENGTH = 10.0  # published strengths lie within 0 to 2; beyond this the result is noise

_DECIMAL = re.compile(r"[+-]?([0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20})")  # float() would also take 1_0 and inf


def parse_multipliers(value: str | Sequence[str | float], n_loras: int, phases: int) -> tuple[tuple[float, ...], ...]:
    """Strengths as [LoRA][phase]. A single number holds for every phase.

    Raises:
        InvalidInput: with every problem found: wrong number of LoRAs or phases, no number, out of bounds.
    """
    if isinstance(value, str):
        value = value.split()
    if len(value) != n_loras:
        raise InvalidInput([Problem(FIELD, f"has {len(value)} entries; this profile has {n_loras} LoRAs")])
    problems: list[Problem] = []
    rows = [_row(entry, f"{FIELD}[{index}]", phases, problems) for index, entry in enumerate(value)]
    if problems:
        raise InvalidInput(problems)
    return tuple(rows)


def _row(entry: str | float, field: str, phases: int, problems: list[Problem]) -> tuple[float, ...]:
    texts = entry.split(";") if isinstance(entry, str) else [entry]
    if len(texts) not in (1, phases):
        problems.append(Problem(field, f"{entry!r} has {len(texts)} phases; give 1 or {phases}, parted by ';'"))
        return ()
    row = []
    for text in texts:
        number = _number(text)
        if number is None:
            problems.append(Problem(field, f"{text!r} is not a number from -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}"))
        else:
            row.append(number)
    return tuple(row * phases if len(texts) == 1 else row)


def _number(entry: object) -> float | None:
    if isinstance(entry, str):
        number: float = float(entry) if _DECIMAL.fullmatch(entry) else math.nan
    elif isinstance(entry, int | float) and not isinstance(entry, bool):
        number = entry
    else:
        return None
    return float(number) if abs(number) <= MAX_STRENGTH else None  # also false for NaN
