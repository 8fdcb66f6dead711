"""The judge of chaos: each rule is silent about a good history, and speaks when one thing is made wrong."""

from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.history import End, History, violations
from tests.servers.runpod_server import Event
from tests.soak.small_jobs import CANARY
from tests.soak.test_success import BODY, OUTPUT

KEY = "worker/ab/image-0.png"
GOOD = {"output": OUTPUT}
FAILED = {"error": f"delivery_failed: out; the file is kept and will be stored as {KEY}",
          "output": {"code": "delivery_failed", "retryable": True}}  # fmt: skip
ELSEWHERE = {"output": OUTPUT | {"image_url": "http://store/bucket/worker/ab/image-0-01234567.png"}}
TWO = {KEY: BODY, "worker/ab/image-0-01234567.png": BODY}
TERM = End(at=100.0, how="term", code=0, left=(), log="ended")
KILL = End(at=3.5, how="kill", code=-9, left=("job-x",), log="")


def job(*kinds_and_bodies: str | dict[str, Any], job_id: str = "job0", at: float = 1.0) -> tuple[Event, ...]:
    """Events a second apart: hand_out, progress, or a result's body."""
    return tuple(
        Event(at + place, each if isinstance(each, str) else "result", job_id, None if isinstance(each, str) else each)
        for place, each in enumerate(kinds_and_bodies)
    )


def history(*events: str | dict[str, Any], **changes: Any) -> History:
    whole = History(
        expected={"job0": frozenset({"", "delivery_failed"})},
        stopped=frozenset(),
        events=job(*events),
        ends=(TERM,),
        objects={KEY: BODY},
    )
    return replace(whole, **changes)


@pytest.mark.parametrize(
    "good",
    [
        history("hand_out", "progress", GOOD),
        history("hand_out", FAILED),
        history("hand_out", GOOD, "hand_out", GOOD),
        history("hand_out", FAILED, "hand_out", "progress", GOOD),
        history("hand_out", "progress", "hand_out", "progress", GOOD, ends=(replace(KILL, at=2.5), TERM)),
        history("hand_out", "progress", stopped=frozenset({"job0"})),
        history("hand_out", FAILED, objects={"worker/ab/image-0-01234567.png": BODY}),
        history("hand_out", GOOD, outbox=(".in-killed",)),
        history("hand_out", GOOD, "hand_out", ELSEWHERE, objects=TWO, guests=frozenset({"job0"})),
        history("hand_out", GOOD, ends=(End(0.5, "unfit", 1, (), "the store did not answer"), TERM)),
    ],
)
def test_violations_are_none_in(good: History) -> None:
    assert violations(good) == []


INTERNAL = {"error": "internal: x", "output": {"code": "internal"}}
LEAKED = {"error": f"internal: no such prompt: {CANARY}", "output": {"code": "delivery_failed"}}


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        ("no_job_is_lost", history(events=())),
        ("no_job_is_lost", history("hand_out", ends=(KILL,))),
        ("every_delivery_is_answered_once", history("hand_out", GOOD, GOOD)),
        ("every_delivery_is_answered_once", history("hand_out", "hand_out", GOOD)),
        ("every_delivery_is_answered_once", history("hand_out", GOOD, "hand_out", ends=(replace(KILL, at=2.5), TERM))),
        ("no_progress_is_late", history("hand_out", GOOD, "progress")),
        ("no_progress_is_late", history("progress", "hand_out", GOOD)),
        ("answers_are_among_the_expected", history("hand_out", INTERNAL)),
        ("answers_are_among_the_expected", history("hand_out", GOOD, expected={"job0": frozenset({"invalid_input"})})),
        ("every_success_is_true", history("hand_out", GOOD, objects={})),
        ("every_success_is_true", history("hand_out", GOOD, objects={KEY: BODY[:-1]})),
        ("a_job_succeeds_with_one_object", history("hand_out", GOOD, "hand_out", ELSEWHERE, objects=TWO)),
        ("what_was_promised_arrives", history("hand_out", FAILED, objects={})),
        ("what_was_promised_arrives", history("hand_out", GOOD, outbox=("damaged-0",))),
        ("workers_end_as_told", history("hand_out", GOOD, ends=(replace(TERM, code=1),))),
        ("workers_end_as_told", history("hand_out", GOOD, ends=(replace(TERM, left=("job-x",)),))),
        ("nothing_leaks", history("hand_out", GOOD, ends=(replace(TERM, log=CANARY),))),
        ("nothing_leaks", history("hand_out", LEAKED)),
    ],
)  # fmt: skip
def test_violations_name_the_rule(rule: str, bad: History) -> None:
    assert {found.split(":")[0] for found in violations(bad)} == {rule}


def test_violations_allow_a_second_object_when_the_first_answer_could_not_be_recorded() -> None:
    told = replace(TERM, log=f"the response of {KEY} was not recorded: the store did not answer")
    assert violations(history("hand_out", GOOD, "hand_out", ELSEWHERE, objects=TWO, ends=(told,))) == []
