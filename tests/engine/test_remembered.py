"""The memory that all three modes keep embeddings in."""

import pytest

from engine.remembered import Remembered


def test_get_computes_a_value_once() -> None:
    remembered: Remembered[str, int] = Remembered()
    computed: list[str] = []

    def value_of(key: str) -> int:
        return remembered.get(key, lambda: computed.append(key) or len(computed))

    assert [value_of(key) for key in "aab"] == [1, 1, 2]
    assert computed == ["a", "b"]


def test_memory_is_bounded_and_forgets_the_longest_unused() -> None:
    remembered: Remembered[str, str] = Remembered(max_entries=2)
    computed: list[str] = []

    for key in ("a", "red", "a", "fox", "a", "red"):
        remembered.get(key, lambda key=key: computed.append(key) or key)

    assert computed == ["a", "red", "fox", "red"]


def test_value_that_could_not_be_computed_is_computed_the_next_time() -> None:
    remembered: Remembered[str, int] = Remembered()

    def broken() -> int:
        raise RuntimeError("the card is out of memory")

    with pytest.raises(RuntimeError):
        remembered.get("a", broken)
    assert remembered.get("a", lambda: 1) == 1
