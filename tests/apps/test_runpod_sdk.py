"""The SDK's code that ours stands on. If one fails, read the new code, then `apps/runpod_loop.py`."""

import hashlib
import importlib
import inspect

import pytest

SOURCES = {
    "runpod.serverless.start": "aa3f846dcfc5da4f",
    "runpod.serverless.worker.run_worker": "ce0b9b3f79f9f9d3",
    "runpod.serverless.worker.main": "d1677091eb50dcb3",
    "runpod.serverless.modules.rp_scale.JobScaler": "b9b75d9270a3ae4f",
    "runpod.serverless.modules.rp_job.handle_job": "849f93639768bc87",
    "runpod.serverless.modules.rp_job.run_job": "3d5c3ab8a46d71fd",
    "runpod.serverless.modules.rp_job.get_job": "8ce238208ca5261a",
    "runpod.serverless.modules.rp_http": "0da3784eecf5260b",
    "runpod.serverless.modules.rp_ping": "6db09105cd27cfa7",
    "runpod.serverless.modules.rp_logger": "e015da598e6356af",
    "runpod.serverless.modules.rp_fitness.run_fitness_checks": "cdfb0bbbce0e2a8d",
    "runpod.serverless.modules.rp_fitness._ensure_gpu_check_registered": "b3985cc26b5353ee",
    "runpod.serverless.modules.rp_fitness._ensure_system_checks_registered": "84437d87b29ef0ef",
    "runpod.serverless.modules.rp_fastapi.WorkerAPI.__init__": "0294e6165bbcaf61",
    "runpod.serverless.modules.rp_fastapi.WorkerAPI.start_uvicorn": "f4360301b289397e",
    "runpod.serverless.modules.rp_fastapi.WorkerAPI._sim_runsync": "703a0a5a142bb342",
    "runpod.http_client.AsyncClientSession": "1c7910233ce3d6d4",
}
"""Name to the first 16 hex digits of the sha256 of its source, in runpod 1.12.0."""


def source_hash(name: str) -> str:
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[depth:]:
            found = inspect.getattr_static(found, attribute)
        return hashlib.sha256(inspect.getsource(found).encode()).hexdigest()[:16]
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", SOURCES)
def test_the_sdk_is_the_one_that_was_read(name: str) -> None:
    assert source_hash(name) == SOURCES[name], f"{name} has changed"
