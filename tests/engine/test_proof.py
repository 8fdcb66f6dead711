"""Self-tests begun ahead: each answer is found once, and what failed in company is tried again alone."""

import threading

import pytest

from engine.proof import Proof

TIMEOUT_S = 10.0


class Asked:
    """A test that remembers its threads, and waits to be let go where it is told to."""

    def __init__(self, *answers):
        self.answers, self.threads = list(answers), []
        self.may_end = threading.Event()

    def __call__(self, device):
        self.threads.append(threading.current_thread())
        assert self.may_end.wait(TIMEOUT_S)
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def test_answer_is_found_once_for_each_question():
    test = Asked("off", None)
    test.may_end.set()
    proof = Proof(test)
    assert [proof("cuda:0"), proof("cuda:1"), proof("cuda:0"), proof("cuda:1")] == ["off", None, "off", None]
    assert len(test.threads) == 2


def test_who_asks_for_what_is_begun_waits_for_it():
    test = Asked(None)
    proof = Proof(test)
    proof.begin("cuda")
    proof.begin("cuda")
    found = []
    asking = [threading.Thread(target=lambda: found.append(proof("cuda"))) for _ in range(3)]
    for thread in asking:
        thread.start()
    assert not found
    test.may_end.set()
    for thread in asking:
        thread.join(TIMEOUT_S)
    assert found == [None] * 3
    (beside,) = test.threads
    assert beside not in asking


@pytest.mark.parametrize("first", ["its result is off", MemoryError("no room beside others")])
def test_what_fails_in_company_is_tried_again_by_who_asks(first):
    test = Asked(first, None)
    test.may_end.set()
    proof = Proof(test)
    proof.begin("cuda")
    assert proof("cuda") is None
    assert test.threads[-1] is threading.current_thread()
    assert proof("cuda") is None
    assert len(test.threads) == 2


def test_what_fails_alone_is_said():
    test = Asked("off", "off still")
    test.may_end.set()
    proof = Proof(test)
    proof.begin("cuda")
    assert [proof("cuda"), proof("cuda")] == ["off still"] * 2


def test_test_that_raises_leaves_no_answer_behind():
    test = Asked(KeyboardInterrupt(), None)
    test.may_end.set()
    proof = Proof(test)
    with pytest.raises(KeyboardInterrupt):
        proof("cuda")
    assert proof("cuda") is None
