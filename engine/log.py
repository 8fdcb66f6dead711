"""What may be written to a log, and how: one line per fact, with the job's id, and nobody's secrets.

Three nets, because the worker shares its process with libraries that log what they like:

1. Our own code logs ids, stages, sizes and seconds; it never logs a payload.
2. Every record of every logger is redacted when it is made, so libraries' own handlers see the safe text.
3. A library's warning is reduced to its place in the source: pipelines quote prompts in warnings.
"""

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Any, TextIO

from engine.settings import Settings

MAX_CHARACTERS = 8000
"""Longest message. RunPod throttles and drops chatty logs."""

_SEARCHED = 65_536
"""Characters of a message that are looked at: half a second of searching for the worst of them."""

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

_OWN = frozenset({
    "__main__", "apps", "bench", "builder", "download_weights", "engine", "examples", "handler",
    "model_handler", "runpod", "schemas", "uvicorn",
})  # fmt: skip
"""First parts of the logger names whose text holds no payload. Everyone else's warnings are withheld."""

_job_id: ContextVar[str] = ContextVar("job_id", default="")

# Repetitions are bounded so that no input makes a search quadratic.
_REDACTIONS = (
    (re.compile(r"\bdata:[\w.+-]{0,80}/?[\w.+-]{0,80}[;,][^\s\"'<>]*"), "data:***"),
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]{1,20}://)[^\s/?#@\"'<>]{1,512}@"), r"\1***@"),
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]{1,20}://[^\s?#\"'<>]{1,2048})[?#][^\s\"'<>]*"), r"\1?***"),
    (
        re.compile(r"(?i)\b(authorization|cookie|x-api-key)\b([\"']?\s{0,4}[:=]\s{0,4}[\"']?)[^\"'\r\n]+"),
        r"\1\2***",
    ),
    (re.compile(r"(?i)\b(bearer|basic)\s{1,4}[\w.~+/=-]{8,}"), r"\1 ***"),
    (
        re.compile(
            r"(?i)([\w-]{0,40}(?:secret|token|passw(?:or)?d|api[_-]?key|access[_-]?(?:key|id)|signature|credential)[\w-]{0,40}"
            r"[\"']?\s{0,4}[:=]\s{0,4})(?:[\"'][^\"'\r\n]*|[^\s\"',;&)}\]]+)"
        ),
        r"\1***",
    ),
    (re.compile(r"(?i)(\bx-amz-[\w-]{1,40}[\"']?\s{0,4}[:=]\s{0,4})[^\s\"',;)}\]]+"), r"\1***"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}|\b(?:hf|rpa|sk)_[A-Za-z0-9]{16,}"), "***"),
)
_RUN = re.compile(r"[A-Za-z0-9+/_-]{60,}={0,2}")


def redact(text: str, secrets: tuple[str, ...] = ()) -> str:
    """Return `text` without data URIs, base64 runs, URL queries and passwords, authorisation headers, keys.

    `secrets`: literal strings that must not appear either. A long text loses its middle, a very long line its end.
    """
    for secret in secrets:
        text = text.replace(secret, "***")
    if len(text) > _SEARCHED:
        # The rest of a cut line is left out: half a secret would not be known for one.
        text = text[: _SEARCHED // 2] + "\n" + text[-_SEARCHED // 2 :].partition("\n")[2]
    for pattern, replacement in _REDACTIONS:
        text = pattern.sub(replacement, text)
    text = _RUN.sub(_elide_run, text)
    if len(text) > MAX_CHARACTERS:  # the ends say most: what it was about, and the exception at a traceback's end
        text = f"{text[: MAX_CHARACTERS // 2]} … {text[-MAX_CHARACTERS // 2 :]}"
    return text


def _elide_run(match: re.Match[str]) -> str:
    """Elide what looks like base64 (both cases and digits), and keep what does not: paths and hex digests."""
    run = match.group()
    mixed = any(c.isupper() for c in run) and any(c.islower() for c in run) and any(c.isdigit() for c in run)
    return f"<{len(run)} characters>" if mixed or len(set(run)) == 1 else run


def mask(text: str, payload: object) -> str:
    """Return `text` without the strings of `payload` (8 characters or more), raw and as `repr` writes them.

    For the texts of foreign exceptions, which may quote a prompt that no pattern can know.
    """
    for string in sorted(_strings(payload), key=len, reverse=True):
        for form in (string, repr(string)[1:-1], json.dumps(string)[1:-1]):
            text = text.replace(form, "***")
    return text


def _strings(payload: object) -> Iterator[str]:
    waiting = [payload]
    while waiting:  # a loop, since a hostile payload may be nested deeper than Python's stack
        value = waiting.pop()
        if isinstance(value, str) and len(value) >= 8:
            yield value
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)


@contextmanager
def for_job(job_id: str) -> Iterator[None]:
    """Put the job's id on every line this thread logs meanwhile; the id's odd characters are replaced."""
    token = _job_id.set(re.sub(r"[^\w.:-]", "?", job_id[:80]))
    try:
        yield
    finally:
        _job_id.reset(token)


def configure(settings: Settings, stream: TextIO | None = None) -> None:
    """Send the process's log to one place: JSON lines on stdout in an endpoint (as the SDK), else to stderr.

    Called once by the entry point. Replaces the handlers that libraries put on the root logger at import.
    """
    if stream is None:
        stream = sys.stdout if settings.in_endpoint else sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_JsonLines() if settings.in_endpoint else _Text())
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or _is_own(record.name))
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if type(h) is not logging.StreamHandler] + [handler]
    root.setLevel(logging.INFO)
    secrets = (settings.bucket_access_key_id, settings.bucket_secret_access_key)
    logging.setLogRecordFactory(partial(_record, tuple(str(secret) for secret in secrets if secret)))
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a record that cannot be written would be dumped with its arguments


def _is_own(logger: str) -> bool:
    return logger.partition(".")[0] in _OWN


def _record(
    secrets: tuple[str, ...],
    name: str,
    level: int,
    path: str,
    line: int,
    message: object,
    args: Any,
    exc_info: _ExcInfo | None,
    function: str | None = None,
    stack: str | None = None,
) -> logging.LogRecord:
    """Make a record whose text is already redacted, for every logger and every handler of the process."""
    record = logging.LogRecord(name, level, path, line, message, args, exc_info, function, stack)
    record.job_id = _job_id.get()
    try:
        text = record.getMessage()
    except Exception as error:  # noqa: BLE001 - a library's bad format string, or an argument's own __str__
        text = f"unprintable message ({type(error).__name__})"
        record.msg, record.args = text, ()
    safe = redact(text, secrets)
    if name and level < logging.ERROR and not _is_own(name):
        safe = f"{_place(record, text)}: text withheld"
    if safe != text:  # else left alone: some formatters read the arguments
        record.msg, record.args = safe, ()
    if exc_info and exc_info[0] is not None:
        # Formatters use a text that is already there, so that this covers libraries' own handlers too.
        record.exc_text = redact("".join(traceback.format_exception(*exc_info)).rstrip(), secrets)
    return record


def _place(record: logging.LogRecord, text: str) -> str:
    """Return where a withheld text came from; a warning's record holds 'file:line: Category: text'."""
    warning = re.match(r"[^\n]{1,400}?:\d{1,7}: \w{1,80}(?=:)", text) if record.name == "py.warnings" else None
    return warning.group() if warning else f"{record.name} at {record.pathname}:{record.lineno}"


class _JsonLines(logging.Formatter):
    """One JSON object a line: the keys of RunPod's SDK (requestId, message, level) and ours beside them."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": "WARN" if record.levelno == logging.WARNING else record.levelname,
            "requestId": getattr(record, "job_id", "") or None,
            "message": record.getMessage(),
        }
        for field in ("stage", "size_bytes", "seconds"):
            if hasattr(record, field):
                line[field] = getattr(record, field)
        if record.exc_text:
            line["traceback"] = record.exc_text
        return json.dumps(line, default=str)


class _Text(logging.Formatter):
    """The line a person reads. Further lines are indented, so that no text can pass for a line of the log."""

    def format(self, record: logging.LogRecord) -> str:
        job_id = getattr(record, "job_id", "")
        text = f"{record.levelname:<7} | {job_id + ' | ' if job_id else ''}{record.getMessage()}"
        if record.exc_text:
            text = f"{text}\n{record.exc_text}"
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", text).replace("\n", "\n    ")
        return text.encode("utf-8", "backslashreplace").decode()
