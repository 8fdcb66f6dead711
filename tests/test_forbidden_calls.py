"""What no module may do, by its source: run foreign data as code, trust a peer blindly, fetch beside the fetcher."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for pattern in (
        "*.py",
        "schemas/*.py",
        "engine/**/*.py",
        "apps/**/*.py",
        "builder/*.py",
        "bench/**/*.py",
        "examples/*.py",
    )
    for path in ROOT.glob(pattern)
)

CODE_AS_DATA = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
FORBIDDEN_CALLS = {
    "eval": "eval", "exec": "exec", "torch.load": "torch.load", "numpy.load": "numpy.load", "os.system": "shell",
    "os.popen": "shell", "subprocess.getoutput": "shell", "subprocess.getstatusoutput": "shell",
    "asyncio.create_subprocess_shell": "shell", "yaml.load": "yaml.load", "yaml.unsafe_load": "yaml.load",
    "tempfile.mktemp": "mktemp", "ssl._create_unverified_context": "unverified", "runpy.run_path": "exec",
}  # fmt: skip
FORBIDDEN_VALUES = {
    "shell": True,
    "trust_remote_code": True,
    "verify": False,
    "check_hostname": False,
    "weights_only": False,
}
"""Keyword, or attribute that is set -> the truth it must not have. What is not written out counts as that."""

NETWORK = (
    "requests",
    "urllib.request",
    "urllib3",
    "httpx",
    "aiohttp",
    "http.client",
    "socket",
    "ssl",
    "ftplib",
    "websockets",
)
OPEN_TO_THE_NETWORK = {
    "engine/fetch.py": "the fetcher itself",
    "engine/connection.py": "the fetcher's pinned connection",
    "engine/guest_wire.py": "a request's own S3 endpoint, over the fetcher's connection",
    "engine/s3_errors.py": "names of exceptions",
    "engine/s3.py": "names of exceptions",
    "apps/runpod_loop.py": "names of exceptions, and the SDK's own session",
    "examples/svi_with_end_frame.py": "a client of the user's own endpoint",
    "examples/runpod_endpoint.py": "a client of the user's own endpoint",
}
FETCHERS = ("load_image", "load_video", "urlopen", "urlretrieve")
HUB_CALLS = (
    "hf_hub_download", "snapshot_download", "hf_hub_url", "repo_info", "model_info", "list_repo_tree",
    "list_repo_files", "from_pretrained", "from_single_file", "load_lora_weights",
)  # fmt: skip


def findings(source: str, module: str) -> set[str]:
    """The rules that the source of `module` (its path in the repository) breaks."""
    tree = ast.parse(source)
    imported = list(_imports(tree))
    named = {short: meant for short, meant, _ in imported}
    found = {"pickle" for _, _, name in imported if name.split(".")[0] in CODE_AS_DATA}
    if module not in OPEN_TO_THE_NETWORK:
        found |= {"network" for _, _, name in imported if any(f"{name}.".startswith(f"{one}.") for one in NETWORK)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found |= _of_call(node, named, module)
        elif isinstance(node, ast.Assign):
            targets = [target.attr for target in node.targets if isinstance(target, ast.Attribute)]
            found |= {target for target in targets if _is_forbidden(target, node.value)}
        elif isinstance(node, ast.Attribute) and node.attr == "CERT_NONE":
            found.add("unverified")
    return found


def _of_call(node: ast.Call, named: dict[str, str], module: str) -> set[str]:
    head, _, rest = ast.unparse(node.func).partition(".")
    name = named.get(head, head) + (f".{rest}" if rest else "")
    last = name.rpartition(".")[2]
    keywords = {word.arg: word.value for word in node.keywords if word.arg is not None}
    found = {FORBIDDEN_CALLS[name]} if name in FORBIDDEN_CALLS else set()
    found |= {word for word, value in keywords.items() if _is_forbidden(word, value)}
    if last in FETCHERS and module not in OPEN_TO_THE_NETWORK:
        found.add("network")
    is_local = ast.unparse(keywords.get("local_files_only", ast.Constant(False))) == "True"
    if last in HUB_CALLS and "revision" not in keywords and not is_local:
        found.add("revision")
    return found


def _is_forbidden(word: str, value: ast.expr) -> bool:
    if word not in FORBIDDEN_VALUES:
        return False
    return not (isinstance(value, ast.Constant) and bool(value.value) is not FORBIDDEN_VALUES[word])


def _imports(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Name in the module, what it stands for, and what is imported: `import os.path` gives os, os, os.path."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                yield alias.asname or top, alias.name if alias.asname else top, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield alias.asname or alias.name, name, name
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for given in node.args[:1]:
                if isinstance(given, ast.Constant):
                    yield "", "", str(given.value)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_source_breaks_no_rule(path: Path) -> None:
    assert findings(path.read_text(), path.relative_to(ROOT).as_posix()) == set()


PLANTED = {
    "import pickle": "pickle",
    "from marshal import loads": "pickle",
    "def f(): import dill": "pickle",
    "import_module('pickle')": "pickle",
    "import torch; torch.load(path)": "torch.load",
    "import torch as t; t.load(path)": "torch.load",
    "from torch import load as read; read(path)": "torch.load",
    "import numpy as np; np.load(path)": "numpy.load",
    "eval(text)": "eval",
    "exec(text)": "exec",
    "import subprocess; subprocess.run(text, shell=True)": "shell",
    "import subprocess; subprocess.run(text, shell=flag)": "shell",
    "import subprocess; subprocess.run(text, shell=1)": "shell",
    "import subprocess; subprocess.getstatusoutput(text)": "shell",
    "from asyncio import create_subprocess_shell; create_subprocess_shell(text)": "shell",
    "import os; os.system(text)": "shell",
    "import os.path; os.popen(text)": "shell",
    "import yaml; yaml.load(text, Loader=yaml.Loader)": "yaml.load",
    "AutoModel.from_pretrained(name, revision=commit, trust_remote_code=True)": "trust_remote_code",
    "client.get(url, verify=False)": "verify",
    "client.get(url, verify=0)": "verify",
    "client.get(url, verify=None)": "verify",
    "context.check_hostname = False": "check_hostname",
    "context.verify_mode = ssl.CERT_NONE": "unverified",
    "import tempfile; tempfile.mktemp()": "mktemp",
    "from tempfile import mktemp; mktemp()": "mktemp",
    "import requests": "network",
    "from urllib.request import urlopen": "network",
    "import urllib.request": "network",
    "import socket": "network",
    "from diffusers.utils import load_image; load_image(url)": "network",
    "import diffusers; diffusers.utils.load_video(url)": "network",
    "from huggingface_hub import hf_hub_download; hf_hub_download(repo, file)": "revision",
    "api.repo_info(repo)": "revision",
    "Pipeline.from_pretrained(name)": "revision",
    "Pipeline.from_pretrained(name, local_files_only=flag)": "revision",
}  # fmt: skip


@pytest.mark.parametrize(("source", "rule"), PLANTED.items())
def test_planted_call_is_caught(source: str, rule: str) -> None:
    assert rule in findings(source, "engine/somewhere.py")


@pytest.mark.parametrize(
    "source",
    [
        "model.eval(); re.compile(x); torch.compile(x); json.load(f); safetensors.torch.load_file(p)",
        "import subprocess; subprocess.run(words, shell=False)",
        "import tempfile; tempfile.mkdtemp()",
        "client.get(url, verify=True)",
        "Tokenizer.from_pretrained(folder, local_files_only=True); api.repo_info(repo, revision=commit)",
        "from urllib.parse import urlsplit",
    ],
)
def test_harmless_call_is_left_alone(source: str) -> None:
    assert findings(source, "engine/somewhere.py") == set()


def test_fetcher_alone_may_open_a_socket() -> None:
    assert findings("import socket", "engine/fetch.py") == set()
    assert findings("import pickle", "engine/fetch.py") == {"pickle"}


def test_every_exception_from_the_network_rule_is_needed() -> None:
    """A module that no longer uses the network loses its place in the list."""
    kept = [
        name for name in OPEN_TO_THE_NETWORK if "network" not in findings((ROOT / name).read_text(), "elsewhere.py")
    ]
    assert kept == []
