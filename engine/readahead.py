"""Baked files on their way into the system's page cache while Python still imports its libraries.

The imports of a first job take 5 to 8 seconds and leave the disk idle. Here the files are read meanwhile, in the order
of need, and thrown away: whoever reads them next finds them in memory. Advice (POSIX_FADV_WILLNEED) would not do: Linux
cuts each such request to one read of the device, a megabyte or less.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from engine import host_memory

# Read by one call; between two of them it can be stopped. Whoever comes back from a call may wait 5 ms for the
# interpreter while another thread imports: after each 16 MiB that made 1.4 GB/s of a disk's 2.5.
STEP_BYTES = 64 * 2**20
BUFFER_BYTES = 2**20  # what one call fills again and again, since nobody looks at it
FIRST = ("vae", "text_encoder", "image_encoder")  # what a job needs before its transformers


def order_of_need(names: Sequence[str]) -> list[str]:
    """A profile's components in the order in which a job needs them: VAE, encoders, then the rest as they stand."""
    return [*(name for name in FIRST if name in names), *(name for name in names if name not in FIRST)]


class ReadAhead:
    """Reads `files` in their order in a thread of its own, up to `max_bytes`. A file that cannot be read is left out.

    None: half of the memory that is free. More would push other pages out, of this very file in the end.
    The first step, if any, is taken before the constructor returns; the rest ends by itself, or with `stop`.
    """

    _last: "ClassVar[ReadAhead | None]" = None

    @classmethod
    def instead(cls, files: Sequence[Path] | None) -> "ReadAhead | None":
        """Stop the one before, which a job that ended early has left at work, and begin; None: begin none."""
        if cls._last is not None:
            cls._last.stop()
        cls._last = None if files is None else cls(files)
        return cls._last

    def __init__(self, files: Sequence[Path], max_bytes: int | None = None) -> None:
        self.bytes_read = 0
        self._stopped = threading.Event()
        steps = self._steps(files, host_memory.free_bytes() // 2 if max_bytes is None else max_bytes)
        next(steps, None)
        self._thread = threading.Thread(target=lambda: [None for _ in steps], name="read-ahead", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Read no further, and wait until the thread is gone."""
        self._stopped.set()
        self._thread.join()

    def _steps(self, files: Sequence[Path], max_bytes: int) -> Iterator[None]:
        places = [bytearray(min(BUFFER_BYTES, STEP_BYTES))] * max(1, STEP_BYTES // BUFFER_BYTES)
        for path in files:
            try:
                with path.open("rb", buffering=0) as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                    offset = 0
                    while self.bytes_read < max_bytes and not self._stopped.is_set():
                        count = os.preadv(stream.fileno(), places, offset)
                        if not count:
                            break
                        offset += count
                        self.bytes_read += count
                        yield
            except OSError:
                continue  # the reader that comes after says what is wrong with it
