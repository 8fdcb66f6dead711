"""The SDK's local API, with JSON for every request: `/runsync`, `/run`, `/status`."""

import logging
from typing import Any

from apps.runpod_answers import seal_error
from apps.runpod_jobs import Jobs
from apps.runpod_loop import quiet_sdk_log
from schemas.errors import InternalError, InvalidInput, Problem

log = logging.getLogger(__name__)


def serve_api(jobs: Jobs, host: str, port: int) -> None:
    """Serve until a signal. A development tool: anyone who reaches the port may run jobs."""
    api(jobs).start_uvicorn(host, port, 1)


def api(jobs: Jobs) -> Any:
    """Build the SDK's API around our handler.

    FastAPI's own answer to a bad body quotes it, and breaks on NaN and lone surrogates.
    """
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from runpod.serverless.modules import rp_fastapi

    def refuse(_request: Request, _error: Exception) -> JSONResponse:
        error = InvalidInput([Problem("", 'the body must be a JSON object with an object under "input"')])
        return JSONResponse(seal_error(error).response(), status_code=error.http_status)

    def fail(_request: Request, error: Exception) -> JSONResponse:
        log.error("the API failed: %s", type(error).__name__)
        return JSONResponse(seal_error(error).response(), status_code=InternalError.http_status)

    quiet_sdk_log()
    worker_api = rp_fastapi.WorkerAPI({"handler": jobs.answer})
    worker_api.rp_app.add_exception_handler(RequestValidationError, refuse)
    worker_api.rp_app.add_exception_handler(Exception, fail)
    return worker_api
