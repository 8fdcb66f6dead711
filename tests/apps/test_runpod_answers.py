"""What may be sent as an answer, and which answers are kept."""

import json

import pytest

from apps.runpod_answers import Answer, FirstAnswers, seal, seal_error
from schemas.errors import FetchFailed, GpuFault, InternalError, InvalidInput, OutputTooLarge, Problem


def nested(depth: int) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "response",
    [
        {"video": b"\0"},
        {"eta": float("nan")},
        {"eta": float("inf")},
        {"text": "\ud800"},
        {"frames": {1, 2}},
        {("a", "b"): 1},
        {"deep": nested(100_000)},
        {},
        None,
        "text",
    ],
    ids=["bytes", "nan", "inf", "surrogate", "set", "key", "deep", "empty", "none", "text"],
)
def test_seal_refuses_what_the_sdk_would_drop(response: object) -> None:
    with pytest.raises(InternalError):
        seal(response, 1000)


def test_seal_counts_the_bytes_as_sent() -> None:
    response = {"text": "é" * 10}  # {"output": {"text": "é…"}}: 12 + 12 + 20 bytes
    assert seal(response, 44).response() == response
    with pytest.raises(OutputTooLarge):
        seal(response, 43)


def test_each_reader_of_an_answer_gets_a_dict_of_its_own() -> None:
    answer = seal({"output": {"a": 1}}, 1000)
    answer.response()["output"].pop("a")
    assert answer.response() == {"output": {"a": 1}}


def test_a_successful_answer_is_final_and_no_fault() -> None:
    answer = seal({"seed": 1}, 1000)
    assert (answer.is_final, answer.is_fault) == (True, False)


@pytest.mark.parametrize(
    ("error", "is_final", "is_fault"),
    [
        (InvalidInput([Problem("seed", "is missing")]), True, False),
        (FetchFailed("the picture could not be fetched"), True, False),
        (GpuFault("the card is lost"), False, True),
        (RuntimeError("anything"), True, False),
    ],
)
def test_an_error_is_final_unless_it_may_pass(error: Exception, is_final: bool, is_fault: bool) -> None:
    answer = seal_error(error)
    assert (answer.is_final, answer.is_fault) == (is_final, is_fault)


def test_an_error_with_a_lone_surrogate_is_sent_without_it() -> None:
    assert seal_error(FetchFailed("no host \udcff")).response()["error"] == "fetch_failed: no host ?"


def test_an_endless_error_is_cut() -> None:
    answer = seal_error(InvalidInput([Problem(f"field{i}", "is unknown") for i in range(100_000)]))
    assert len(answer.body) < 5000
    assert answer.response()["code"] == "invalid_input"


def job(job_id: str = "a", payload: object = "fox", **top_level: object) -> dict[str, object]:
    return {"id": job_id, "input": payload, **top_level}


def sealed(text: str, is_final: bool = True) -> Answer:
    return Answer(json.dumps(text).encode(), is_final=is_final, is_fault=False)


def test_a_first_answer_is_recalled_for_the_same_id_and_input_only() -> None:
    answers = FirstAnswers(60.0)
    answers.remember(job(), sealed("first"))
    assert answers.recall(job()) == sealed("first")
    assert answers.recall(job(delayTime=5)) == sealed("first")
    assert answers.recall(job("b")) is None
    assert answers.recall(job(payload="owl")) is None
    assert answers.recall(job(s3Config={"bucketName": "other"})) is None


def test_an_answer_is_not_recalled_when_its_urls_are_old() -> None:
    now = 100.0
    answers = FirstAnswers(60.0, now=lambda: now)
    answers.remember(job(), sealed("first"))
    now = 160.0
    assert answers.recall(job()) == sealed("first")
    now = 160.1
    assert answers.recall(job()) is None
    answers.remember(job(), sealed("again"))
    assert answers.recall(job()) == sealed("again")


def test_an_answer_that_may_change_is_not_kept() -> None:
    answers = FirstAnswers(60.0)
    answers.remember(job(), sealed("later", is_final=False))
    assert answers.recall(job()) is None


@pytest.mark.parametrize("payload", [nested(100_000), {"a": object()}], ids=["deep", "not JSON"])
def test_a_strange_job_is_not_remembered(payload: object) -> None:
    answers = FirstAnswers(60.0)
    answers.remember(job(payload=payload), sealed("first"))
    assert answers.recall(job(payload=payload)) is None


def test_the_oldest_answers_are_forgotten_by_number() -> None:
    answers = FirstAnswers(60.0, max_answers=2)
    for name in "abc":
        answers.remember(job(name), sealed(name))
    assert [answers.recall(job(name)) is not None for name in "abc"] == [False, True, True]


def test_the_oldest_answers_are_forgotten_by_size() -> None:
    answers = FirstAnswers(60.0, max_bytes=100)
    for name in "abc":
        answers.remember(job(name), sealed(name * 40))
    assert [answers.recall(job(name)) is not None for name in "abc"] == [False, True, True]


def test_an_answer_larger_than_the_memory_is_not_kept_and_drives_none_out() -> None:
    answers = FirstAnswers(60.0, max_bytes=100)
    answers.remember(job("a"), sealed("a"))
    answers.remember(job("b"), sealed("b" * 200))
    assert answers.recall(job("a")) is not None
    assert answers.recall(job("b")) is None


def test_the_memory_counts_a_replaced_answer_once() -> None:
    answers = FirstAnswers(60.0, max_bytes=100)
    for _ in range(10):
        answers.remember(job("a"), sealed("a" * 40))
    answers.remember(job("b"), sealed("b" * 40))
    assert answers.recall(job("a")) is not None
