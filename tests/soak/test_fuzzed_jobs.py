"""Fuzzed requests through the whole worker: each is answered, with a code, and the worker lives.

The worker has no weights, so that a request which happens to be right ends as `weights_missing`.
"""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from schemas.input_schema import INPUT_SCHEMA
from tests.figures import Figure
from tests.schemas.test_fuzz import ANY_KEY, JSON, payloads
from tests.servers.runpod_server import RunPodServer
from tests.servers.worker_process import ROOT, start_worker

pytest_plugins = ["tests.figures"]

ANYTHING = st.one_of(*(payloads(mode) for mode in INPUT_SCHEMA), JSON, ANY_KEY)


def can_be_sent(payload: Any) -> bool:
    """Whether the platform could hand it out: as JSON, of a size it takes, and not null."""
    try:
        return payload is not None and len(json.dumps(payload)) < 1_000_000
    except ValueError:  # an integer that Python does not print
        return False


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_thousand_fuzzed_requests_are_each_answered_by_one_worker(tmp_path: Path, figure: Figure) -> None:
    codes: Counter[str] = Counter()
    numbers = itertools.count()
    (tmp_path / "weights").mkdir()
    environment = {"WORKER_WEIGHTS_DIR": str(tmp_path / "weights"), "SOAK_UNCHECKED": "1", "RUNPOD_ENDPOINT_ID": "e0"}

    with (
        RunPodServer() as server,
        start_worker(server, [ROOT / "tests/soak/worker.py"], tmp_path, environment) as worker,
    ):

        @settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
        @given(ANYTHING)
        def ask(payload: Any) -> None:
            assume(can_be_sent(payload))
            job_id = f"job{next(numbers)}"
            server.queue(job_id, payload)
            answer = server.result(job_id, timeout_s=60.0)
            assert "Traceback" not in json.dumps(answer)
            codes[answer["output"]["code"]] += 1

        ask()
        assert worker.process.poll() is None
    figure("fuzzed requests through one worker", ", ".join(f"{count} {code}" for code, count in codes.most_common()))
    assert codes.keys() <= {"invalid_input", "weights_missing"}
    assert codes.total() >= 1000
