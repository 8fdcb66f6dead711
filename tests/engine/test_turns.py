"""Short turns for the whole process, given back once."""

import sys
import threading

import pytest

from engine.turns import TURN_S, short_turns


def test_short_turns_last_until_the_last_asker_leaves():
    before, entered, gate = sys.getswitchinterval(), threading.Event(), threading.Event()

    def ask() -> None:
        with short_turns():
            entered.set()
            assert gate.wait(10)

    first = threading.Thread(target=ask)
    first.start()
    assert entered.wait(10)
    with short_turns():
        gate.set()
        first.join()
        assert sys.getswitchinterval() == pytest.approx(TURN_S)
    assert sys.getswitchinterval() == before


def test_short_turns_do_not_make_shorter_ones_longer():
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN_S / 2)
    try:
        with short_turns():
            assert sys.getswitchinterval() == pytest.approx(TURN_S / 2, abs=2e-6)  # kept in whole microseconds
    finally:
        sys.setswitchinterval(before)


def test_short_turns_end_with_an_error():
    before = sys.getswitchinterval()
    with pytest.raises(KeyError), short_turns():
        raise KeyError
    assert sys.getswitchinterval() == before
