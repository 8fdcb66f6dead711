"""The worker as handler.py starts it, without the SDK's sleep of a second between two jobs.

SOAK_LEAK_BYTES makes every job keep so many bytes for ever: the control of the test that looks for leaks.
SOAK_UNCHECKED leaves the checks at start out, for a worker that has no weights and is only asked things.
"""

import os
import sys

import handler
from tests.apps.fake_worker import hurry


def leak(size_bytes: int) -> None:
    run = handler.run
    kept = []

    def run_and_keep(*args, **options):
        kept.append(os.urandom(size_bytes))
        return run(*args, **options)

    handler.run = run_and_keep


def unchecked() -> None:
    def no_checks(_settings):
        return []

    handler.fitness.checks = no_checks


if __name__ == "__main__":
    hurry()
    if size := os.environ.get("SOAK_LEAK_BYTES"):
        leak(int(size))
    if os.environ.get("SOAK_UNCHECKED"):
        unchecked()
    sys.exit(handler.main())
