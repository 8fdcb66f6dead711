"""A line on stderr with the process's age: a run that is cut tells where it was."""

import sys
import time

STARTED = time.monotonic()


def say(text: str) -> None:
    print(f"bench {time.monotonic() - STARTED:7.1f} s  {text}", file=sys.stderr, flush=True)
