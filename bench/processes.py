"""Each measurement in a process of its own: its memory, its compiler, its clocks.

`once` asks a process one thing. `Arm` keeps one alive between jobs, so that two arms can take turns on one card.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Fragments would cost 1 to 2 GiB of the cap; the worker's image sets the same.
ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


class Died(Exception):
    """The process ended without an answer; its reason is on stderr."""


class Arm:
    """A process that runs jobs when it is asked. See bench.cells.serve."""

    def __init__(self, cell: dict[str, Any]) -> None:
        reading, writing = os.pipe()
        self._answers = os.fdopen(reading)
        try:
            self._process = subprocess.Popen(
                [*_command(cell), "--answers", str(writing)],
                cwd=ROOT, env=os.environ | ALLOCATOR, stdin=subprocess.PIPE, stdout=sys.stderr, text=True,
                pass_fds=[writing],
            )  # fmt: skip
        finally:
            os.close(writing)

    def ask(self, what: str, **details: Any) -> dict[str, Any]:
        """Have something done, and wait for what it says.

        Raises:
            Died: it failed, and the process with it.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **details}) + "\n")
            self._process.stdin.flush()
            answer = self._answers.readline()
        except OSError:
            answer = ""
        if not answer.endswith("\n"):  # nothing, or what it got out before it was killed
            raise Died(f"exit code {self._process.wait()}")
        return dict(json.loads(answer))

    def close(self) -> None:
        """Let the process end by itself, and its memory with it."""
        assert self._process.stdin is not None
        with suppress(OSError):  # what was not read before the process ended
            self._process.stdin.close()
        self._process.wait()
        self._answers.close()


def once(cell: dict[str, Any]) -> dict[str, Any] | None:
    """The answer of a process made for this; None if it fails, with the reason on stderr."""
    arm = Arm(cell)
    try:
        return arm.ask("measure")
    except Died as error:
        print(f"bench: {cell['what']} failed with {error}", file=sys.stderr)
        return None
    finally:
        arm.close()


def _command(cell: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "bench", "--cell", json.dumps(cell)]
