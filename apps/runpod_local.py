"""One job from the command line: `--test_input`."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from apps.runpod_jobs import Jobs
from engine.settings import ROOT

TEST_INPUT = ROOT / "test_input.json"
LOCAL_JOB_ID = "local_test"


class NotAJob(Exception):
    """What was given as a job is none; the sentence says why."""


def run_local(jobs: Jobs, given: str) -> int:
    """Run one job and write its whole response as the last line of stdout. Returns the exit code, 0 or 1.

    `given`: a job as JSON, or the name of a file that holds one. Errors go to stderr too, a line each.
    """
    try:
        job = read_job(given)
    except NotAJob as error:
        sys.stderr.write(f"{error}\n")
        return 1
    response = asyncio.run(jobs.answer(job))
    for problem in response.get("problems", [{"field": "", "message": response.get("error")}]):
        if problem["message"]:
            sys.stderr.write(": ".join(part for part in problem.values() if part) + "\n")
    sys.stdout.write(json.dumps(response) + "\n")
    sys.stdout.flush()
    return 1 if "error" in response else 0


def read_job(given: str) -> dict[str, Any]:
    """Read a job from JSON, or from a file if `given` does not look like JSON.

    Raises:
        NotAJob: no such file, no JSON, no object, or nothing under "input".
    """
    text = given if given.lstrip().startswith(("{", "[")) else _read_file(given)
    try:
        job = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotAJob(f"--test_input is not JSON: {error}") from None
    if not isinstance(job, dict) or job.get("input") is None:
        raise NotAJob('--test_input must be a JSON object with an "input"')
    job.setdefault("id", LOCAL_JOB_ID)
    if not isinstance(job["id"], str):
        raise NotAJob("--test_input: the job's id must be a string")
    return job


def _read_file(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise NotAJob(f"--test_input is neither JSON nor a file that can be read: {name[:200]!r} ({reason})") from None
