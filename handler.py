"""The worker's entry on RunPod, and the story of one request.

python handler.py                         take jobs (on RunPod)
python handler.py --test_input [JSON]     run one job here: test_input.json beside this file, a file, or JSON
python handler.py --rp_serve_api          serve RunPod's HTTP API on this machine
python handler.py --plan                  print what would run on this card and how; exits 0, or 1 if something cannot
python handler.py --warm-up               compile for the usual sizes into WORKER_CACHE_DIR; reads no weights
"""

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from engine import fitness, inputs, profiles, weights
from engine.backends import Task, import_backend
from engine.disk import work_folder
from engine.progress import Progress
from engine.settings import Settings
from engine.spares import SPARES
from engine.storage import open_store, sweep_outbox
from model_handler import ModelHandler
from schemas.errors import SettingsError
from schemas.input_schema import parse_request
from schemas.output_schema import success

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Worker:
    """What outlives a request."""

    settings: Settings
    models: ModelHandler


def run(
    payload: object,
    *,
    job_id: str,
    worker: Worker,
    progress: Progress,
    s3_config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Take one request from JSON to a verified, delivered file, and answer with what was measured.

    Raises:
        WorkerError: with a sentence for the caller; nothing of the request is left behind.
    """
    request = parse_request(payload)
    store = open_store(worker.settings, s3_config, pause=progress.pause)
    fingerprint = inputs.fingerprint(payload)
    if (answered := store.recall(job_id, fingerprint)) is not None:
        return answered  # the platform delivered the job twice
    baked = weights.locate(profiles.resolve(request), worker.settings)
    with progress.timed("load"), progress.timed("load_import"):
        parts = baked.parts()  # in a new process files and driver are got ready from here on
    worker.models.gate(baked.profile).admit(request)  # what cannot run is refused before anything is fetched
    with progress.stage("fetch"):
        media = inputs.load(request, worker.settings, progress.check)
    task = Task(baked.profile, request, inputs.draw_seed(request), media.pictures)
    with progress.stage("load"), progress.timed("load_import"):
        worker.models.wake(baked.profile)  # what a first load asks of the card begins beside the imports
        import_backend(baked.profile)
    with work_folder() as folder:
        made = worker.models.generate(task, parts, folder, progress)
        with progress.stage("upload"):
            delivered = store.deliver(made.files, job_id)
    response = success(task, made, delivered, media.hashes, progress.timings_s)
    return store.record(job_id, fingerprint, response, delivered)


def warm_up(payload: dict[str, Any], worker: Worker) -> None:
    """Run a request before the first caller's, which then waits for no import or load and has no compiler beside it.

    No file of it is kept, and WORKER_DEADLINE_S does not end it.

    Raises:
        WorkerError: as `run`; this worker cannot do such jobs.
    """
    started = time.monotonic()
    with work_folder() as folder:
        here = replace(worker.settings, output_dir=folder, bucket_endpoint_url=None, in_cloud=False)
        run(payload, job_id="warm-up", worker=replace(worker, settings=here), progress=Progress())
    worker.models.finish()
    log.info("warmed up for %s in %.1f s", payload["mode"], time.monotonic() - started)


def main() -> int:
    """Read the settings, then hand `run` to RunPod's loop, its local API or a single test job."""
    from apps import runpod_worker
    from apps.operator_commands import COMMANDS, check_plan
    from apps.standby import get_ready
    from apps.warm_up_request import warm_up_request

    try:
        settings = Settings.from_env()
    except SettingsError as error:
        print(f"settings_error: {error.sentence}", file=sys.stderr)  # noqa: T201 nothing is set up yet to log with
        return 1
    worker = Worker(settings, ModelHandler(settings))
    if (command := COMMANDS.get(" ".join(sys.argv[1:]))) is not None:
        return command(settings, worker.models)

    def run_job(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
        return run(job["input"], job_id=job["id"], worker=worker, progress=progress, s3_config=job.get("s3Config"))

    checks: list[Callable[[], None]] = [*fitness.checks(settings), partial(check_plan, settings, worker.models)]
    checks += [partial(warm_up, warm_up_request(wanted), worker) for wanted in settings.warm_up]
    beside = [partial(sweep_outbox, settings), partial(SPARES.keep, inputs.CHILDREN)]
    ahead = None if settings.warm_up else partial(get_ready, settings, worker.models)
    return runpod_worker.serve(run_job, settings, sys.argv[1:], checks, beside=beside, ahead=ahead)


if __name__ == "__main__":
    sys.exit(main())
