"""A job without a model: the loop around it is what the tests are about.

The job's input says what happens: `steps` of `step_s` each, then `then`. Each start, finish of the steps and end is
written to the file FAKE_JOB_LOG, so that a test can see what really ran, and when.
"""

import ctypes
import os
import time
from pathlib import Path
from typing import Any

from engine.progress import Progress
from schemas.errors import GpuFault, InvalidInput, Problem


def run(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    asked = job["input"]
    _note("start", job["id"])
    try:
        with progress.stage("denoise", asked.get("steps", 1)) as step:
            for _ in range(asked.get("steps", 1)):
                time.sleep(asked.get("step_s", 0.0))
                step()
        _note("finish", job["id"])
        return finish(asked.get("then", "answer"), asked)
    finally:
        _note("end", job["id"])


def finish(then: str, asked: dict[str, Any]) -> Any:
    """End the job the way its input asks for."""
    if then == "answer":
        return {"echo": asked.get("echo"), "video_url": asked.get("url", "file:///video.mp4")}
    if then == "fault":
        raise GpuFault("the card is lost")
    if then == "invalid":
        raise InvalidInput([Problem("prompt", "is missing"), Problem("seed", "must be an integer \ud800")])
    if then == "raise":
        raise RuntimeError(f"no such prompt: {asked['prompt']} at /secret/path")
    if then == "exit":
        raise SystemExit(3)
    if then == "interrupt":
        raise KeyboardInterrupt
    if then == "memory":
        raise MemoryError
    if then == "recurse":
        return finish(then, asked)
    if then == "hang":
        time.sleep(3600)
    if then == "freeze":
        ctypes.PyDLL(None).sleep(3600)  # PyDLL keeps the interpreter's lock, as a bad native library would
    return {
        "bytes": {"video": b"\0"},
        "nan": {"eta": float("nan")},
        "surrogate": {"text": "\udcff"},
        "big": {"video": "x" * asked.get("size", 0)},
        "none": None,
        "empty": {},
    }[then]


def _note(what: str, job_id: str) -> None:
    if path := os.environ.get("FAKE_JOB_LOG"):
        with Path(path).open("a") as log:
            log.write(f"{time.monotonic():.4f} {what} {job_id}\n")
