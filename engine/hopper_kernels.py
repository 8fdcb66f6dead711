"""The kernels of engine.attention_hopper: compiled, or as an earlier process or the image's build has kept them.

A kept one is a shared library with the card's code in it. To load it takes milliseconds and none of CuTe, which needs a
second of imports on a slow host and 3 to 5 to compile. Linked, because CuTe's own way to read what it exports begins
with importing all of it; by the C compiler that Triton needs too.
"""

import hashlib
import logging
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from engine.artefacts import replace_file, version_of
from engine.settings import cute_dir

log = logging.getLogger(__name__)

KERNELS = {
    "attention8": "engine.attention8_hopper:Attention8",
    "attention16": "engine.attention16_hopper:Attention16",
}
SOURCES = ("attention_hopper", "attention_weights", "attention_reach")  # of every kernel, besides its own
# Another version of one of them makes another library; the second one's name says for which CUDA it compiles.
PACKAGES = ("nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-cu13", "apache-tvm-ffi")
ARCHITECTURE = "sm_90a"  # of every Hopper: the card's name decides nothing, and where libraries are made there is none
NAME = "attend"  # of the function in a library
LINK_TIMEOUT_S = 30.0


@cache
def hopper_kernel(name: str) -> Callable[..., None]:
    """A function of tensors; see the class in KERNELS for which. It runs on torch's current stream.

    Raises:
        Exception: whatever a missing package or a compiler has to say.
    """
    folder = cute_dir()
    if folder is not None and (kept := _load(folder, name)) is not None:
        return kept
    made = compile_kernel(name)
    if folder is not None:
        try:
            keep(made, folder, name)
        except Exception as error:  # noqa: BLE001 CuTe has errors of its own, and the kernel works whether kept or not
            log.warning("the kernel of %s could not be kept (%s)", name, type(error).__name__)
    function: Callable[..., None] = made
    return function


def compile_kernel(name: str) -> Any:
    """For any number of queries, keys and heads; needs no card where CUTE_DSL_ARCH is ARCHITECTURE. 3 to 5 s."""
    module, of = KERNELS[name].split(":")
    return getattr(import_module(module), of)().compiled()


def keep(made: Any, folder: Path, name: str) -> Path:
    """Write what `compile_kernel` made as a library into `folder`, for `hopper_kernel` of later processes.

    Raises:
        Exception: there is no compiler, no room, or CuTe has something to say.
    """
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch) / "library.so"
        _link(made, library)
        content = library.read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_stem(name)}-{_digest(content)}.so"
    replace_file(path, content)
    return path


def _stem(name: str) -> str:
    """What the names of this kernel's files begin with: everything that the library depends on is in it."""
    own = KERNELS[name].split(":")[0].removeprefix("engine.")
    here = Path(__file__).parent
    sources = [_digest((here / f"{file}.py").read_bytes()) for file in (own, *SOURCES)]
    parts = [*sources, ARCHITECTURE, *(f"{package} {version_of(package)}" for package in PACKAGES)]
    return f"{name}-{_digest('|'.join(parts).encode())}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _load(folder: Path, name: str) -> Callable[..., None] | None:
    for path in folder.glob(f"{_stem(name)}-*.so"):
        try:
            if not path.stem.endswith(_digest(path.read_bytes())):
                raise ValueError("damaged, which would end the process, not fail")
            import tvm_ffi

            function: Callable[..., None] = getattr(tvm_ffi.load_module(str(path)), NAME)
        except Exception as error:  # noqa: BLE001 what it calls may lie elsewhere by now; then it is as good as none
            log.warning("the kept kernel %s could not be read (%s); compiling anew", path.name, type(error).__name__)
        else:
            return function
    return None


def _link(made: Any, library: Path) -> None:
    """The library finds what it calls where that lies now: it is not for another machine's packages."""
    from cutlass import cute

    part = library.with_suffix(".o")
    made.export_to_c(object_file_path=str(part), function_name=NAME)
    called = [Path(each) for each in cute.runtime.find_runtime_libraries(enable_tvm_ffi=True)]
    there = [f"-Wl,-rpath,{each.parent}" for each in called]
    subprocess.run(
        ["gcc", "-shared", "-o", library, part, *there, *called],
        check=True,
        capture_output=True,
        timeout=LINK_TIMEOUT_S,
    )
