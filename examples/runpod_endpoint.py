"""A job on a RunPod endpoint, from a client's side: queue it, follow it, take it back."""

import json
import os
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

RUNPOD = "https://api.runpod.ai/v2/"
MAX_BODY_BYTES = 10_000_000  # what RunPod takes on /run
POLL_S = 2.0
MAX_MISSES = 10  # polls in a row that may fail before the job is given up
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
UNANSWERED = (OSError, HTTPException, ValueError)
"""What a call raises: HTTP errors and time-outs among the first, an answer cut short, an answer that is no JSON."""
LOST = (401, 403, 404)  # polls that no patience helps: the key, or a result that is gone after 30 minutes

Show = Callable[[Mapping[str, Any]], None]
"""Takes the worker's progress: stage, step, total, percent, eta_s."""


class EndpointFailed(Exception):
    """Why there is no output, in a sentence."""


@dataclass(frozen=True)
class Endpoint:
    """A worker on RunPod, by the address under which its jobs are."""

    url: str
    key: str

    @classmethod
    def named(cls, name: str) -> "Endpoint":
        """`name`: an endpoint's ID, or the URL that /run and /status stand under. The key is in RUNPOD_API_KEY.

        Raises:
            EndpointFailed: the key is not set.
        """
        key = os.environ.get("RUNPOD_API_KEY", "")
        if not key:
            raise EndpointFailed("RUNPOD_API_KEY is not set; an endpoint needs it")
        return cls((name if "://" in name else RUNPOD + name).rstrip("/"), key)

    def run(self, request: Mapping[str, Any], timeout_s: int, show: Show) -> dict[str, Any]:
        """Queue the job, follow it to its end and return its output. Ctrl-C takes it back.

        `timeout_s`: RunPod ends the job after so long; its own default of 600 s is short for a video.

        Raises:
            EndpointFailed: the job was not taken, failed, or can be neither followed nor taken back.
        """
        body = json.dumps({"input": request, "policy": {"executionTimeout": 1000 * timeout_s}}).encode()
        if len(body) > MAX_BODY_BYTES:
            raise EndpointFailed(f"the request has {len(body) / 1e6:.1f} MB, RunPod takes 10; give large media as URLs")
        try:
            job = self._call("run", body)["id"]
        except UNANSWERED as error:
            raise EndpointFailed(f"the endpoint did not take the job: {error}") from error
        try:
            answer = self._follow(job, show)
        except KeyboardInterrupt:
            self._take_back(job)
            raise
        if answer["status"] != "COMPLETED":
            raise EndpointFailed(answer.get("error") or f"the job ended as {answer['status']}")
        output: dict[str, Any] = answer["output"]
        return output

    def _follow(self, job: str, show: Show) -> dict[str, Any]:
        misses = 0
        while True:
            try:
                answer = self._call(f"status/{job}")
            except UNANSWERED as error:
                misses += 1
                if misses == MAX_MISSES or getattr(error, "code", None) in LOST:
                    raise EndpointFailed(f"job {job} cannot be followed any more: {error}") from error
            else:
                misses = 0
                if answer["status"] in ENDED:
                    return answer
                if "percent" in (answer.get("output") or {}):
                    show(answer["output"])
            time.sleep(POLL_S)

    def _take_back(self, job: str) -> None:
        try:
            self._call(f"cancel/{job}", b"{}")
        except UNANSWERED as error:
            raise EndpointFailed(f"job {job} could not be taken back and may still run: {error}") from error

    def _call(self, path: str, body: bytes | None = None) -> dict[str, Any]:
        """POST `body`, or GET without one."""
        request = urllib.request.Request(f"{self.url}/{path}", body, {"Content-Type": "application/json"})
        request.add_unredirected_header("Authorization", f"Bearer {self.key}")  # for this host and no other
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
        return answer
