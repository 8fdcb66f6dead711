"""No file of the repository holds what looks like a key. Keys that tests make up say that they are."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "AWS access key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "AWS secret key": rb"(?i)secret_?(?:access_?)?key\W{1,6}[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])",
    "Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}\b",
    "RunPod key": rb"\brpa_[A-Z0-9]{20,}[A-Za-z0-9]*\b",
    "GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})\b",
    "index token": rb"\bpypi-AgE[A-Za-z0-9_-]{50,}",
    "OpenAI-like key": rb"\bsk-[A-Za-z0-9_-]{32,}\b",
    "Google key": rb"\bAIza[A-Za-z0-9_-]{35}\b",
    "Slack token": rb"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "private key": rb"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----\s+[A-Za-z0-9+/=]{40}",
    "signed URL": rb"X-Amz-Signature=[0-9a-f]{64}\b",
    "JSON web token": rb"\beyJ[A-Za-z0-9_-]{15,}\.eyJ[A-Za-z0-9_-]{15,}\.[A-Za-z0-9_-]{20,}",
}
MADE_UP = (b"CANARY", b"EXAMPLE", b"LOOPBACK")


def secrets(data: bytes) -> set[str]:
    """The kinds of key that are in `data`."""
    return {
        kind
        for kind, shape in SHAPES.items()
        for match in re.finditer(shape, data)
        if not any(word in match[0].upper() for word in MADE_UP)
    }


def repository_files() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this copy of the tree has no git to list its files")
    return [path for name in listed.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_holds_a_key() -> None:
    found = {path.relative_to(ROOT).as_posix(): secrets(path.read_bytes()) for path in repository_files()}
    assert {name: kinds for name, kinds in found.items() if kinds} == {}


def test_files_are_the_repositorys_and_not_what_is_built() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in repository_files()}
    assert {"handler.py", "Dockerfile", "builder/requirements.lock"} <= names
    assert not [name for name in names if name.startswith((".venv/", "weights/", "build/"))]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("AWS access key", "key = '" + "AKIA" + "Q7ZJ2M4XK9W3B5TR'"),
        ("AWS secret key", "BUCKET_SECRET_ACCESS_KEY=" + "aB3/" * 10),
        ("Hugging Face token", "HF_TOKEN=" + "hf_" + "aBcDeFgHiJ" * 3 + "kLmN"),
        ("RunPod key", "rpa_" + "Q7ZJ2M4XK9" * 4),
        ("GitHub token", "ghp_" + "a1B2c3D4e5F6" * 3),
        ("index token", "pypi-" + "AgEIcHlwaS5vcmc" + "a1B2c3D4e5" * 5),
        ("OpenAI-like key", "sk-" + "a1B2c3D4" * 5),
        ("Google key", "AIza" + "SyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q"),
        ("Slack token", "xoxb-" + "123456789012-abcdefghij"),
        ("private key", "-----BEGIN RSA " + "PRIVATE KEY-----\n" + "MIIE" * 16),
        ("signed URL", "https://x.test/v.mp4?X-Amz-" + "Signature=" + "0a" * 32),
        ("JSON web token", "eyJ" + "hbGciOiJIUzI1NiJ9x" + ".eyJ" + "zdWIiOiIxMjM0NTY3" + "." + "c2lnbmF0dXJl" * 3),
    ],
)
def test_planted_key_is_found(kind: str, text: str) -> None:
    assert secrets(text.encode()) == {kind}


@pytest.mark.parametrize(
    "text", ["AKIA" + "CANARYCANARYCANA", "AKIA" + "IOSFODNN7EXAMPLE", "hf_hub_download", "rpa_", "sk-"]
)
def test_what_is_no_key_is_left_alone(text: str) -> None:
    assert secrets(text.encode()) == set()
