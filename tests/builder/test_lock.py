"""builder/requirements.lock: what the image installs, against what the worker asks for. Offline."""

from importlib.metadata import requires, version

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from builder.lockfile import LOCK, ROOT, Locked, normalised, read_lock

REQUIREMENTS = ROOT / "builder" / "requirements.txt"
THE_IMAGE = {"platform_system": "Linux", "sys_platform": "linux", "platform_machine": "x86_64", "extra": ""}
FLOORS = {
    "runpod": "1.12",  # refuses private addresses when it fetches; below 1.10.1 all jobs go to one worker
    "urllib3": "2.6.3",  # bodies that unpack to gigabytes
    "pillow": "12.3",
    "torch": "2.10",
    "transformers": "5.3",  # trust_remote_code=False could be got round
    "safetensors": "0.8",
}


def pins(text: str) -> dict[str, str]:
    """Package -> version, of a file of exact pins."""
    lines = [line.partition("==") for line in text.splitlines() if line and not line.startswith(("#", "-r "))]
    return {normalised(name): pin for name, _, pin in lines}


def stale(requirements: str, lock: str) -> list[str]:
    """What makes a lock not that of these requirements."""
    locked = {one.name: one for one in read_lock(lock)}
    wanted = pins(requirements)
    asked = {name for name, one in locked.items() if "-r builder/requirements.txt" in one.needed_by}
    found = [
        f"{name} {pin} is not locked" for name, pin in wanted.items() if pin != getattr(locked.get(name), "version", "")
    ]
    found += [f"{name} is locked and no longer asked for" for name in sorted(asked - wanted.keys())]
    for name, one in locked.items():
        found += [f"{name} has no hash"] * (not one.sha256) + [f"{name}: nobody needs it"] * (not one.needed_by)
        needing = [need for need in one.needed_by if not need.startswith("-r ")]
        found += [f"{name}: {need} is not locked" for need in needing if need not in locked]
    return found


@pytest.fixture(scope="module")
def locked() -> dict[str, Locked]:
    return {one.name: one for one in read_lock(LOCK.read_text())}


def test_lock_is_that_of_the_requirements() -> None:
    assert stale(REQUIREMENTS.read_text(), LOCK.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("boto3==1.44.5", "boto3==1.44.6", "boto3 1.44.6 is not locked"),
        ("ftfy==6.3.1\n", "ftfy==6.3.1\nnewcomer==1.0\n", "newcomer 1.0 is not locked"),
        ("ftfy==6.3.1\n", "", "ftfy is locked and no longer asked for"),
    ],
)
def test_stale_lock_is_noticed(old: str, new: str, complaint: str) -> None:
    text = REQUIREMENTS.read_text()
    assert old in text
    assert stale(text.replace(old, new, 1), LOCK.read_text()) == [complaint]


def missing_needs(locked: dict[str, Locked]) -> set[str]:
    """What a pinned package needs by its own metadata and the lock does not give it. Extras are the asker's matter."""
    found = set()
    for name in pins(REQUIREMENTS.read_text()):
        for line in requires(name) or ():
            need = Requirement(line)
            if need.marker is not None and not need.marker.evaluate(THE_IMAGE):
                continue
            entry = locked.get(normalised(need.name))
            if entry is None or not need.specifier.contains(entry.version, prereleases=True):
                found.add(f"{name} needs {need.name}")
    return found


def test_lock_holds_what_every_pinned_package_needs(locked: dict[str, Locked]) -> None:
    assert missing_needs(locked) == set()


def test_missing_package_is_noticed(locked: dict[str, Locked]) -> None:
    assert missing_needs({name: one for name, one in locked.items() if name != "wcwidth"}) == {"ftfy needs wcwidth"}


def test_lock_is_for_a_card(locked: dict[str, Locked]) -> None:
    assert {"triton", "nvidia-cudnn-cu13", "nvidia-cublas"} <= locked.keys()
    assert locked["torch"].version == "2.13.0"  # a build's own mark, as in +cpu, would be another index's file


@pytest.mark.parametrize(
    "line",
    [
        "runpod @ git+https://example.org/runpod.git",
        "https://example.org/av-18.1.0-cp311-abi3-manylinux_2_28_x86_64.whl \\",
        "boto3>=1.44 \\",
        "boto3 \\",
        "--extra-index-url https://example.org/simple",
        "    --hash=md5:0123456789abcdef0123456789abcdef",
    ],
)
def test_lock_refuses_what_pins_nothing(line: str) -> None:
    with pytest.raises(ValueError, match="pins nothing"):
        read_lock(f"{LOCK.read_text()}{line}\n")


def test_missing_hash_is_noticed() -> None:
    lines = LOCK.read_text().splitlines()
    at = lines.index("zipp==4.1.2 \\")
    kept = [line for line in lines[at:] if "--hash" not in line]
    assert "zipp has no hash" in stale(REQUIREMENTS.read_text(), "\n".join([*lines[:at], *kept]))


@pytest.mark.parametrize(("package", "floor"), FLOORS.items())
def test_locked_and_installed_versions_are_past_what_is_known_to_be_unsafe(
    package: str, floor: str, locked: dict[str, Locked]
) -> None:
    assert Version(locked[package].version) >= Version(floor)
    assert Version(version(package)) >= Version(floor)


def test_floors_would_refuse_older_versions() -> None:
    older = {"runpod": "1.11.2", "urllib3": "2.6.2", "pillow": "12.2.0", "torch": "2.9.1", "transformers": "5.2.0",
             "safetensors": "0.7.0"}  # fmt: skip
    assert [name for name, floor in FLOORS.items() if Version(older[name]) >= Version(floor)] == []


def test_image_installs_the_lock_by_hash_and_nothing_else() -> None:
    lines = [line.strip() for line in (ROOT / "Dockerfile").read_text().splitlines()]
    installs = [line.removeprefix("RUN ") for line in lines if "pip" in line and "install" in line.split()]
    assert installs == ["pip install --require-hashes --only-binary :all: -r builder/requirements.lock"]


def test_no_other_index_is_named_anywhere() -> None:
    files = [ROOT / "Dockerfile", ROOT / "Makefile", *sorted((ROOT / "builder").glob("requirements*"))]
    named = [path.name for path in files if "index-url" in path.read_text() or "find-links" in path.read_text()]
    assert named == []
