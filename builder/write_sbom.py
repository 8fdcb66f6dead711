"""Write the bill of materials of this environment, CycloneDX 1.5 as JSON: Python, its packages, Debian's, the weights.

python builder/write_sbom.py [--weights FOLDER] [--output FILE]
"""

import argparse
import json
import platform
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from any folder

from builder.distributions import NOT_STATED, Installed, installed  # noqa: E402 after the path is set
from builder.weights_bill import Bill, weights  # noqa: E402
from engine.hub import Lock  # noqa: E402
from schemas.output_schema import WORKER_VERSION  # noqa: E402

WORKER = "svi-worker"
DPKG = Path("/var/lib/dpkg/status")
WEIGHTS_LOCK = ROOT / "builder" / "weights.lock.json"


def bill(weights_dir: Path, lock: Lock, dpkg: Path) -> dict[str, Any]:
    """The whole document. Only its serial number and its time differ between two of the same environment."""
    packages = installed()
    models, merged = weights(weights_dir, lock)
    refs = {one.name: _purl(one) for one in packages}
    needs = [
        {"ref": refs[one.name], "dependsOn": [refs[need] for need in one.needs if need in refs]} for one in packages
    ]
    worker = {"type": "application", "bom-ref": WORKER, "name": WORKER, "version": WORKER_VERSION}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": uuid.uuid4().urn,
        "version": 1,
        "metadata": {"timestamp": datetime.now(UTC).isoformat(timespec="seconds"), "component": worker},
        "components": [_python(), *map(_package, packages), *_debian(dpkg), *models],
        "dependencies": [*needs, *merged],
    }


def _python() -> Bill:
    version = platform.python_version()
    return {"type": "platform", "bom-ref": f"pkg:generic/cpython@{version}", "name": "cpython", "version": version}


def _package(one: Installed) -> Bill:
    found = {"type": "library", "bom-ref": _purl(one), "name": one.name, "version": one.version, "purl": _purl(one)}
    if one.licence == NOT_STATED:
        return found
    return found | {"licenses": [{"expression": one.licence} if one.is_spdx else {"license": {"name": one.licence}}]}


def _purl(one: Installed) -> str:
    return f"pkg:pypi/{one.name}@{quote(one.version, safe='')}"


def _debian(status: Path) -> list[Bill]:
    """Debian's packages by dpkg's own list; none where there is no dpkg."""
    if not status.is_file():
        return []
    found = []
    for paragraph in status.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        if fields.get("Status", "").endswith(" installed"):
            name, version = fields["Package"], fields["Version"]
            purl = f"pkg:deb/debian/{quote(name)}@{quote(version, safe='')}?arch={fields['Architecture']}"
            found.append({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl})
    return found


def main(argv: list[str] | None = None) -> int:
    """Write the file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "baked", help="default: weights/baked")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "sbom.cdx.json", help="build/sbom.cdx.json")
    options = parser.parse_args(argv)
    document = bill(options.weights, Lock.read(WEIGHTS_LOCK), DPKG)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{options.output}: {len(document['components'])} components")
    return 0


if __name__ == "__main__":
    sys.exit(main())
