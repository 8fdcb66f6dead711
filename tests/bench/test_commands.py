"""Every command of the bench that a page or a program's own help shows is one."""

import re
from importlib import import_module
from importlib.util import find_spec

import pytest

from bench.processes import ROOT

PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "decisions").glob("*.md")]
SHOWN = re.compile(r"python -m (bench[\w.]*\w|bench)((?: [^\s`|(\[]+)*)")


def shown(text: str) -> list[tuple[str, list[str]]]:
    """Program and words of each; in a program's help the explanation stands two spaces or more behind."""
    return [(program, words.split()) for program, words in SHOWN.findall(text)]


def commands() -> list[tuple[str, list[str]]]:
    pages = [path for path in PAGES if path.name != "LOG.md"]  # what was run then, with the options of then
    found = [one for path in [*pages, *(ROOT / "bench").glob("*.py")] for one in shown(path.read_text())]
    return sorted({(program, " ".join(words)): (program, words) for program, words in found}.values())


@pytest.mark.parametrize(
    ("program", "words"), commands(), ids=lambda part: part if isinstance(part, str) else " ".join(part)
)
def test_shown_command_is_taken(program: str, words: list[str]) -> None:
    assert find_spec(program) is not None
    module = import_module("bench.__main__" if program == "bench" else program)
    if hasattr(module, "_arguments"):
        module._arguments().parse_args(words)


def test_commands_are_found_and_a_wrong_option_would_be_noticed() -> None:
    found = commands()
    assert ("bench", ["jobs", "--modes", "short", "--arms", "ours", "--repeats", "50", "--trace"]) in found
    assert ("bench.acceptance", ["--output", "build/acceptance", "--skip", "done"]) in found
    assert len(found) > 25
    with pytest.raises(SystemExit):
        test_shown_command_is_taken(*shown("`python -m bench jobs --count-bytes`")[0])
