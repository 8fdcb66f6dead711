"""A kernel's self-test: its answer is found once a process, and may be begun before anybody waits for it.

Where no compiled kernel is kept, a test compiles its own: 0.1 to 1.7 s each on two cores, nine tenths of which Triton
leaves the interpreter to others. So the tests that a load will ask for run beside each other and beside the building of
its models (engine.speed.prove_ahead).
"""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from functools import update_wrapper

Answer = Future[str | None]
AGAIN = "begun, and not well"


class Proof:
    """The test as a function: why a kernel is not to be used, or None. A decorator.

    What is found amiss beside other tests is looked at again alone, by whoever asks: it may have been the company.
    """

    __wrapped__: Callable[..., str | None]

    def __init__(self, test: Callable[..., str | None]) -> None:
        update_wrapper(self, test)
        self._lock = threading.Lock()
        self._answers = dict[tuple[Hashable, ...], Answer]()

    def __call__(self, *asked: Hashable) -> str | None:
        while True:
            answer, is_mine = self._answer(asked)
            if is_mine:
                self._find(answer, asked)
            if (found := answer.result()) != AGAIN:
                return found

    def begin(self, *asked: Hashable) -> None:
        """Have the answer found in a thread, if nobody has begun."""
        answer, is_mine = self._answer(asked)
        if is_mine:
            threading.Thread(target=self._find_beside, args=(answer, asked), name="proof", daemon=True).start()

    def _answer(self, asked: tuple[Hashable, ...]) -> tuple[Answer, bool]:
        """And whether it is the caller's to find."""
        with self._lock:
            if asked in self._answers:
                return self._answers[asked], False
            self._answers[asked] = answer = Answer()
            return answer, True

    def _find(self, answer: Answer, asked: tuple[Hashable, ...]) -> None:
        try:
            answer.set_result(self.__wrapped__(*asked))
        except BaseException:
            self._forget(answer, asked)
            raise

    def _find_beside(self, answer: Answer, asked: tuple[Hashable, ...]) -> None:
        try:
            is_well = self.__wrapped__(*asked) is None
        except BaseException:  # noqa: BLE001 who asks sees it for himself
            is_well = False
        if is_well:
            answer.set_result(None)
        else:
            self._forget(answer, asked)

    def _forget(self, answer: Answer, asked: tuple[Hashable, ...]) -> None:
        with self._lock:
            del self._answers[asked]
        answer.set_result(AGAIN)
