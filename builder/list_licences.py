"""Write the table of Python packages in docs/licences.md from their own metadata; --check fails where the two differ.

python builder/list_licences.py [--check]

The table lists what builder/requirements.lock puts into the image. A package that is not installed here (the CUDA
libraries, on a machine without a card) keeps the row that it has for this version, or is marked as not read.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from any folder

from builder.distributions import installed  # noqa: E402 after the path is set
from builder.lockfile import LOCK, Locked, read_lock  # noqa: E402

PAGE = ROOT / "docs" / "licences.md"
BEGIN = "<!-- packages: written by builder/list_licences.py -->\n"
END = "<!-- end of packages -->\n"
HEAD = "| package | version | licence, in the package's own words |\n|---|---|---|\n"
NOT_READ = "not read"


def table(locked: tuple[Locked, ...], read: dict[tuple[str, str], str], before: str) -> str:
    """The rows for `locked`. `read`: (name, version) -> licence, of what is installed; `before`: what they replace."""
    kept = dict(_row(line) for line in before.splitlines() if line.startswith("| "))
    rows = []
    for one in locked:
        key = (one.name, one.version)
        rows.append(f"| {one.name} | {one.version} | {read.get(key) or kept.get(key, NOT_READ)} |\n")
    return HEAD + "".join(rows)


def page(text: str, locked: tuple[Locked, ...], read: dict[tuple[str, str], str]) -> str:
    """The page with its table written anew.

    Raises:
        ValueError: the page has no place for the table.
    """
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has no place for the table: it lies between two comments")
    return before + begin + table(locked, read, old) + end + after


def read_here() -> dict[tuple[str, str], str]:
    """(name, version) -> licence. A build's own mark, as in 2.13.0+cpu, does not count: the source is the same."""
    return {(one.name, one.version.partition("+")[0]): one.licence for one in installed()}


def _row(line: str) -> tuple[tuple[str, str], str]:
    name, version, licence = line.removeprefix("| ").removesuffix(" |").split(" | ")
    return (name, version), licence


def main(argv: list[str] | None = None) -> int:
    """Write or compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page differs")
    options = parser.parse_args(argv)
    text = PAGE.read_text(encoding="utf-8")
    wanted = page(text, read_lock(LOCK.read_text()), read_here())
    if text == wanted:
        return 0
    if options.check:
        print(f"{PAGE.name} is not what the packages say; run python builder/list_licences.py", file=sys.stderr)
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
