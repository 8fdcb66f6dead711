"""Compiled graphs kept between processes: on a network volume, or in an image made on a machine with the same card."""

import hashlib
import logging
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

log = logging.getLogger(__name__)

PACKAGES = ("torch", "triton", "diffusers")  # another version of one of them makes other graphs


@dataclass(frozen=True)
class Artefacts:
    """The graph of one size, in one file, so that workers which meet different sizes do not undo each other.

    The files are executed when they are read: `folder` must be writable by nobody but the operator.
    """

    folder: Path
    variant: str
    """What else decides the graphs: precision and attention kernel, as fp8-flash4."""
    size: str = ""
    """Everything that the graph was compiled for."""

    def of(self, size: str) -> "Artefacts":
        """The same folder and variant for one size."""
        return replace(self, size=size)

    @property
    def path(self) -> Path:
        """One file for this size and variant on this card with these versions."""
        parts = [self.variant, self.size, card_name(), *(f"{name} {version_of(name)}" for name in PACKAGES)]
        return self.folder / f"compiled-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.bin"

    def load(self) -> bool:
        """Put what is there into the compiler's cache; False if nothing usable is."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return False
        try:
            return torch.compiler.load_cache_artifacts(content) is not None
        except Exception as error:  # noqa: BLE001 a damaged file fails in any way, and is as good as none
            log.warning("compiled kernels could not be read (%s); compiling anew", type(error).__name__)
            return False

    def save(self) -> bool:
        """Write what this process has compiled; False if that is nothing, or the folder cannot be written.

        A reader never sees half a file. The file may hold other sizes of this process too, which harms nobody.
        """
        saved = torch.compiler.save_cache_artifacts()
        if saved is None:
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, saved[0])
        except OSError as error:
            log.warning("compiled kernels could not be kept (%s)", type(error).__name__)
            return False
        return True


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` there at once: a reader finds what was there before, or all of it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.stem}-", suffix=".part", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            Path(file.name).replace(path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise


def card_name() -> str:
    """What kernels were compiled for."""
    if not torch.cuda.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} {major}.{minor} CUDA {torch.version.cuda}"


def version_of(package: str) -> str:
    """Of an installed package; "none" where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
