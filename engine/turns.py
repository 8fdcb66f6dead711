"""How long a thread may keep Python's interpreter while another one waits for it."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# A call into torch, FFmpeg or x264 gives the interpreter away and asks for it back, and a thread that computes in
# Python may keep it for a whole interval. With a free core for each, an operator of torch beside such a thread took
# 650 us instead of 3 at Python's 5 ms, and 40 at 0.2. The end of 81 frames of 832x480 came 0.46 s after the last frame
# at 5 ms, 0.17 at 0.5, with two cores and x264 in eight threads.
TURN_S = 0.0002


class _Turns:
    """How many ask for short turns now, and the interval that was there before the first of them."""

    lock = threading.Lock()
    askers = 0
    before_s = 0.0


@contextmanager
def short_turns() -> Iterator[None]:
    """Let threads take turns more often; for the whole process, until the last one that asked for it leaves."""
    with _Turns.lock:
        if _Turns.askers == 0:
            _Turns.before_s = sys.getswitchinterval()
            sys.setswitchinterval(min(TURN_S, _Turns.before_s))
        _Turns.askers += 1
    try:
        yield
    finally:
        with _Turns.lock:
            _Turns.askers -= 1
            if _Turns.askers == 0:
                sys.setswitchinterval(_Turns.before_s)
