"""The RunPod door: the command line, and which of the three ways to take jobs it means.

    handler.py                               takes jobs from RunPod; elsewhere runs test_input.json
    handler.py --test_input ['{...}' | FILE] runs one job and exits 0, or 1 if it failed
    handler.py --rp_serve_api                serves the SDK's API on this machine

Nothing here loads a model or, before jobs are taken, the SDK.
"""

import argparse
import os
import sys
import threading
from collections.abc import Callable, Sequence

from apps.runpod_jobs import Jobs, Run
from apps.runpod_local import TEST_INPUT, run_local
from apps.runpod_watch import PRODUCTION, Limits
from engine import log
from engine.settings import Settings


def serve(
    run: Run,
    settings: Settings,
    argv: Sequence[str],
    checks: Sequence[Callable[[], None]] = (),
    limits: Limits = PRODUCTION,
    beside: Sequence[Callable[[], None]] = (),
    ahead: Callable[[], None] | None = None,
) -> int:
    """Take jobs the way `argv` says, and return the process's exit code.

    `run`: one job, as RunPod gives it, to its response; called in one thread, never twice at a time.
    `argv`: the arguments without the program's name.
    `checks`: run once before the first job of an endpoint; one that raises ends the process with code 1.
    `ahead`: run once in a thread of its own from when an endpoint asks for jobs; the process waits for it.
    `beside`: each run once in a thread of its own, from when the log is set up; the process does not wait for it.
    After a fault of the card this does not return: it ends the process.
    """
    args = _arguments(argv)
    log.configure(settings)
    for work in beside:
        threading.Thread(target=work, name="beside", daemon=True).start()
    jobs = Jobs(run, settings, limits)
    code = 0
    try:
        if args.rp_serve_api:
            from apps.runpod_api import serve_api

            serve_api(jobs, args.rp_api_host or "localhost", 8000 if args.rp_api_port is None else args.rp_api_port)
        elif args.test_input is not None or not settings.in_cloud:
            code = run_local(jobs, str(TEST_INPUT) if args.test_input is None else args.test_input)
        else:
            from apps.runpod_loop import take_jobs

            take_jobs(jobs, checks, limits, ahead)
    except KeyboardInterrupt:
        code = 130  # 128 + SIGINT, as shells have it
    if jobs.is_faulty:  # a thread may hang, and the interpreter would wait for it
        sys.stdout.flush()
        os._exit(1)
    return code


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what would have no effect ends the process with code 2, like what is unknown."""
    parser = argparse.ArgumentParser(prog="handler.py", allow_abbrev=False, description=__doc__.splitlines()[0])
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "--test_input",
        nargs="?",
        const=str(TEST_INPUT),
        metavar="JSON|FILE",
        help="run one job; without a value, the test_input.json beside handler.py",
    )
    ways.add_argument("--rp_serve_api", action="store_true", help="serve RunPod's API for development")
    ways.add_argument("--plan", action="store_true", help="print what would run on this card, and where it would lie")
    ways.add_argument("--warm-up", action="store_true", help="compile for the usual sizes into WORKER_CACHE_DIR")
    parser.add_argument("--rp_api_host", help="where the API listens (default: localhost)")
    parser.add_argument("--rp_api_port", type=int, help="its port (default: 8000)")
    args = parser.parse_args(argv)
    if args.plan or args.warm_up:  # handler.py takes them, where they are all there is
        parser.error("--plan and --warm-up are given alone")
    if (args.rp_api_host is not None or args.rp_api_port is not None) and not args.rp_serve_api:
        parser.error("--rp_api_host and --rp_api_port need --rp_serve_api")
    return args
