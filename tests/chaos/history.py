"""What happened in a chaos run, and what must be true of it whatever happened."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from tests.servers.runpod_server import Event
from tests.soak.small_jobs import CANARY
from tests.soak.success import is_true, key_of

KEPT = re.compile(r"will be stored as (\S+)$")


@dataclass(frozen=True)
class End:
    """How one worker ended.

    `how`: told to leave, told so while it was still starting, killed, or of its own accord before it took a job, since
    the store was out. `left`: what its temporary folder still holds.
    """

    at: float
    how: Literal["term", "early", "kill", "unfit"]
    code: int
    left: tuple[str, ...]
    log: str


@dataclass(frozen=True)
class History:
    """`expected`: by job id the codes that the job may be answered with, "" for success.

    `guests`: jobs that brought a bucket of their own. `objects`: the whole objects of every bucket. `outbox`: what is
    left in it at the end.
    """

    expected: dict[str, frozenset[str]]
    stopped: frozenset[str]
    events: tuple[Event, ...]
    ends: tuple[End, ...]
    objects: dict[str, bytes]
    outbox: tuple[str, ...] = ()
    guests: frozenset[str] = frozenset()

    @cached_property
    def by_job(self) -> dict[str, list[Event]]:
        """The hand-outs, updates and results of each job, as they came."""
        jobs: dict[str, list[Event]] = {job_id: [] for job_id in self.expected}
        for event in self.events:
            if event.kind in ("hand_out", "progress", "result"):
                jobs[event.job_id].append(event)
        return jobs

    def answers(self, job_id: str) -> list[dict[str, Any]]:
        return [event.body for event in self.by_job[job_id] if event.kind == "result"]

    def successes(self, job_id: str) -> list[dict[str, Any]]:
        return [answer["output"] for answer in self.answers(job_id) if "error" not in answer]

    def end_after(self, at: float) -> End | None:
        """The end of the worker that lived at this moment."""
        return next((end for end in self.ends if end.at >= at), None)


def no_job_is_lost(history: History) -> Iterator[str]:
    for job_id in history.expected.keys() - history.stopped:
        if not history.answers(job_id):
            yield f"{job_id} was never answered"


def every_delivery_is_answered_once(history: History) -> Iterator[str]:
    """A job that a worker was handed is answered by it once, unless it was killed first or the job was stopped."""
    for job_id, events in history.by_job.items():
        open_since = None
        for event in (event for event in events if event.kind != "progress"):
            if event.kind == "result":
                if open_since is None:
                    yield f"{job_id} was answered more often than it was handed out"
                open_since = None
            else:
                yield from _abandoned(history, job_id, open_since)
                open_since = event.at
        yield from _abandoned(history, job_id, open_since)


def _abandoned(history: History, job_id: str, since: float | None) -> Iterator[str]:
    if since is None or job_id in history.stopped:
        return
    end = history.end_after(since)
    if end is None or end.how != "kill":
        yield f"{job_id} was handed to a worker that did not answer it and was not killed"


def no_progress_is_late(history: History) -> Iterator[str]:
    for job_id, events in history.by_job.items():
        is_open = False
        for event in events:
            if event.kind == "progress" and not is_open:
                yield f"{job_id} made progress while nobody worked on it"
            is_open = event.kind == "hand_out" or (is_open and event.kind == "progress")


def answers_are_among_the_expected(history: History) -> Iterator[str]:
    for job_id, codes in history.expected.items():
        for answer in history.answers(job_id):
            code = "" if "error" not in answer else answer.get("output", {}).get("code", "none")
            if code not in codes:
                yield f"{job_id} was answered {code or 'with success'}: {answer.get('error', '')}"


def every_success_is_true(history: History) -> Iterator[str]:
    for job_id in history.expected:
        for output in history.successes(job_id):
            if not is_true(output, history.objects):
                yield f"{job_id} was answered with success, and its object is missing or not that"


def a_job_succeeds_with_one_object(history: History) -> Iterator[str]:
    """Delivered again, a job is answered from its first result, unless that could not be recorded, which is logged.

    Not a guest's: a record in a bucket of the caller's is not believed, so another worker makes the job again.
    """
    logs = "\n".join(end.log for end in history.ends)
    for job_id in history.expected.keys() - history.guests:
        keys = sorted({key_of(output) for output in history.successes(job_id)})
        if len(keys) > 1 and not any(f"{key} was not recorded" in logs for key in keys):
            yield f"{job_id} succeeded with {keys}"


def what_was_promised_arrives(history: History) -> Iterator[str]:
    """A failed delivery names the key under which the outbox will store the file; another file there has a suffix."""
    for job_id in history.expected:
        for answer in history.answers(job_id):
            promised = KEPT.search(answer.get("error", ""))
            if promised and not _stands(promised[1], history.objects):
                yield f"{job_id} was told that {promised[1]} would be stored"
    yield from (f"the outbox still holds {name}" for name in history.outbox if not name.startswith("."))


def _stands(key: str, objects: dict[str, bytes]) -> bool:
    stem, dot, extension = key.rpartition(".")
    named = re.compile(rf"{re.escape(stem)}(-[0-9a-f]{{8}})?{re.escape(dot + extension)}")
    return any(named.fullmatch(each) for each in objects)


def workers_end_as_told(history: History) -> Iterator[str]:
    wanted = {"term": 0, "early": -15, "kill": -9, "unfit": 1}
    for number, end in enumerate(history.ends):
        if end.code != wanted[end.how]:
            yield f"worker {number} ended with {end.code} ({end.how}): {end.log[-2000:]}"
        if end.how == "term" and end.left:
            yield f"worker {number} left {end.left} behind"


def nothing_leaks(history: History) -> Iterator[str]:
    for number, end in enumerate(history.ends):
        if CANARY in end.log:
            yield f"worker {number} logged a canary"
    for job_id in history.expected:
        for output in history.answers(job_id):
            text = json.dumps({name: value for name, value in output.items() if "error" in output or name != "output"})
            if CANARY in text or "Traceback" in text or "/tmp" in text:
                yield f"{job_id} was answered with a canary, a traceback or a path"


RULES: tuple[Callable[[History], Iterator[str]], ...] = (
    no_job_is_lost,
    every_delivery_is_answered_once,
    no_progress_is_late,
    answers_are_among_the_expected,
    every_success_is_true,
    a_job_succeeds_with_one_object,
    what_was_promised_arrives,
    workers_end_as_told,
    nothing_leaks,
)


def violations(history: History) -> list[str]:
    """What is not as it must be, in words."""
    return [f"{rule.__name__}: {found}" for rule in RULES for found in rule(history)]
