"""A Markdown table of numbers."""

from collections.abc import Sequence


def rows(header: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    """Numbers keep three digits that matter."""
    lines = [header, ["---"] * len(header), *[[_cell(value) for value in line] for line in body]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list | tuple):
        return " ".join(_cell(each) for each in value)
    return str(value).replace("|", "\\|")
