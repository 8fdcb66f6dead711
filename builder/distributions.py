"""The Python packages that are installed here, with the licence that each states in its own metadata."""

from importlib.metadata import PackageMetadata, distributions
from typing import NamedTuple

from packaging.requirements import Requirement

from builder.lockfile import normalised

NOT_STATED = "not stated"
LONGEST_NAME = 80  # characters: some packages put the whole text of a licence where its name belongs


class Installed(NamedTuple):
    """One installed package. `needs`: normalised names, without what only an extra asks for."""

    name: str
    version: str
    licence: str
    is_spdx: bool
    """Whether `licence` is an SPDX expression; else it is the package's own words."""
    needs: tuple[str, ...]


def installed() -> list[Installed]:
    """Every package on the import path, by name; of two with one name the one that Python imports."""
    found: dict[str, Installed] = {}
    for one in distributions():
        name = normalised(one.metadata["Name"])
        asked = [Requirement(line) for line in one.requires or ()]
        needs = {normalised(need.name) for need in asked if need.marker is None or need.marker.evaluate({"extra": ""})}
        row = Installed(name, one.version, *licence(one.metadata), tuple(sorted(needs)))
        found.setdefault(name, row)
    return [found[name] for name in sorted(found)]


def licence(metadata: PackageMetadata) -> tuple[str, bool]:
    """What a package says of its licence, and whether that is an SPDX expression."""
    fields = metadata.json
    if expression := fields.get("license_expression"):
        return str(expression), True
    classifiers = [line.split(" :: ") for line in metadata.get_all("Classifier") or ()]
    names = [parts[-1] for parts in classifiers if parts[0] == "License"]
    stated = str(fields.get("license", "")).strip()
    if len(names) > 1:
        return " / ".join(names), False
    if stated and stated != "UNKNOWN" and len(stated) <= LONGEST_NAME and "\n" not in stated:
        return stated, False
    return (names[0] if names else NOT_STATED), False
