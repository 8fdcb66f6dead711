"""Kernels that came with the image (builder/compile_kernels.py), found in the folder where a worker keeps its own.

That folder may be new, and on a network volume. Triton looks in one folder only. Each of its entries is a folder with a
list in it, which names the entry's files by where they lie. So the list is all that must be written: 400 bytes in place
of four files and 50 kB, and a kernel is read from the image's own disk. To a worker of another image, which has no such
files, such an entry is as good as none: it compiles, and writes a list of its own.
"""

import logging
import shutil
import tempfile
from pathlib import Path

from engine.artefacts import replace_file

log = logging.getLogger(__name__)

LIST = "__grp__*"  # of an entry's files, in Triton's words a group


def lend(image: Path, folder: Path) -> None:
    """Put into `folder` what it lacks of `image`; both are laid out as engine.settings.keep_kernels has it.

    No other worker that does the same at the same time finds half of anything. Where `folder` is full, or cannot be
    written after all, it is said, and the rest is compiled.
    """
    try:
        for entry in _lacking(image / "triton", folder / "triton"):
            _lend_entry(entry, folder / "triton")
        for library in _lacking(image / "cute", folder / "cute"):
            replace_file(folder / "cute" / library.name, library.read_bytes())
    except OSError as error:
        log.warning("the image's kernels could not be put into %s (%s)", folder, type(error).__name__)


def _lacking(image: Path, folder: Path) -> list[Path]:
    """What `image` holds and `folder`, which is made if need be, does not."""
    if not image.is_dir():
        return []
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.name for path in folder.iterdir()}
    return sorted(path for path in image.iterdir() if path.name not in there)


def _lend_entry(entry: Path, folder: Path) -> None:
    """All at once: under a name that nobody asks for, then under its own."""
    made = Path(tempfile.mkdtemp(dir=folder, prefix="lent-"))
    try:
        made.chmod(0o755)
        for file in entry.glob(LIST):
            shutil.copyfile(file, made / file.name)
        made.rename(folder / entry.name)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        if not (folder / entry.name).is_dir():  # else another worker was first
            raise
