"""Baked files on their way into the system's page cache while Python still imports its libraries.

The imports of a first job take 5 to 8 seconds and leave the disk idle. Here the files are read meanwhile, in the order
of need, and thrown away: whoever reads them next finds them in memory. It goes on while they do: what was read ahead
takes them a second to read once more, in which the disk would rest, and while a model is built they have nothing to
read. When they have caught up it ends (`reached`). What is in memory already is passed over: to copy it once more costs
the imports beside it a second and more. Advice (POSIX_FADV_WILLNEED) would not do: Linux cuts each such request to one
read of the device, a megabyte or less.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from engine import host_memory

# Whoever comes back from a call waits for the interpreter while another thread imports: 5 ms for its turn, and tenths
# of a second while a large library is linked, which gives no turns. So two threads read in turn, and by large calls:
# of a disk's 2.4 GB/s one with 64 MiB a call made 1.9; two with 64, 128 and 256 MiB make 2.1, 2.2 and 2.3. Between two
# calls a thread can be stopped.
THREADS = 2
STEP_BYTES = 256 * 2**20
BUFFER_BYTES = 2**20  # what one call fills again and again, since nobody looks at it
FIRST = ("vae", "text_encoder", "image_encoder")  # what a job needs before its transformers


def order_of_need(names: Sequence[str]) -> list[str]:
    """A profile's components in the order in which a job needs them: VAE, encoders, then the rest as they stand."""
    return [*(name for name in FIRST if name in names), *(name for name in names if name not in FIRST)]


class ReadAhead:
    """Reads `files` in their order in threads of its own, up to `max_bytes`. A file that cannot be read is left out.

    None: half of the memory that is free. More would push other pages out, of this very file in the end.
    The first step, if any, is taken before the constructor returns; the rest ends by itself, or with `stop`.
    """

    last: "ClassVar[ReadAhead | None]" = None
    """The one that was begun last, if it was not stopped for another."""
    _is_owed: ClassVar[bool] = False

    @classmethod
    def of(cls, files: Sequence[Path], *, begins: bool) -> "ReadAhead | None":
        """The one at work on these files, or else a new one, if it `begins` or is owed. One of others is stopped.

        One is at work already if a worker has read ahead of its first job, or a job has ended before its load.
        """
        if cls.last is not None and cls.last._files != list(files):
            cls.last.stop()
            cls.last = None
        if cls.last is None and (begins or cls._is_owed):
            cls.last, cls._is_owed = cls(files), False
        return cls.last

    @classmethod
    def owe(cls) -> None:
        """The next call of `of` begins one: libraries are imported, and which files a first job needs is not known."""
        cls._is_owed = True

    def __init__(self, files: Sequence[Path], max_bytes: int | None = None) -> None:
        self.bytes_read = 0
        self._files = list(files)
        self._taken = [0] * len(files)  # how much of each file the steps taken so far cover
        self._left = host_memory.free_bytes() // 2 if max_bytes is None else max_bytes
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        readers = [self._steps() for _ in range(THREADS)]
        next(readers[0], None)
        self._threads = [
            threading.Thread(target=lambda steps=steps: [None for _ in steps], name="read-ahead", daemon=True)
            for steps in readers
        ]
        for thread in self._threads:
            thread.start()

    def reached(self, bytes_taken: int) -> None:
        """Who reads the files for good, in about this order, has come so far. Ends it if that is as far as this is."""
        if bytes_taken >= self.bytes_read:
            self.end()

    def end(self) -> None:
        """Read no further; does not wait for what is under way."""
        self._stopped.set()

    def join(self) -> None:
        """Wait until the threads are gone."""
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        """Read no further, and wait until the threads are gone."""
        self.end()
        self.join()

    def _steps(self) -> Iterator[None]:
        """A thread's: whatever steps nobody has taken, one after the other."""
        places = [bytearray(min(BUFFER_BYTES, STEP_BYTES))] * max(1, STEP_BYTES // BUFFER_BYTES)
        for i, path in enumerate(self._files):
            try:
                with path.open("rb", buffering=0) as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                    size = os.fstat(stream.fileno()).st_size
                    while (offset := self._take(i, size)) is not None:
                        count = min(STEP_BYTES, size - offset)
                        if not _is_in_memory(stream.fileno(), offset, count):
                            count = os.preadv(stream.fileno(), places, offset)
                        with self._lock:
                            self.bytes_read += count
                        yield
            except OSError:
                continue  # the reader that comes after says what is wrong with it

    def _take(self, i: int, size: int) -> int | None:
        """Where the next step of file `i` begins; None: there is none, or no more may be read."""
        with self._lock:
            offset = self._taken[i]
            if offset >= size or self._left <= 0 or self._stopped.is_set():
                return None
            self._taken[i] += STEP_BYTES
            self._left -= min(STEP_BYTES, size - offset)
            return offset


def _is_in_memory(descriptor: int, offset: int, count: int) -> bool:
    """Whether the page cache holds the first and the last byte of a step, and so, it may be taken, what is between.

    Files are read and forgotten from their beginning on. To ask for every page would cost more than it saves, and who
    reads for good finds out what is not there.
    """
    try:
        return all(os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT) for at in (offset, offset + count - 1))
    except (OSError, AttributeError):  # it would have to wait; a file system or a kernel that cannot tell
        return False
