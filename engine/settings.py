"""The only module that touches the environment. `Settings.from_env` makes one frozen value of it, or refuses."""

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from engine.addresses import parse_allowed
from schemas.errors import SettingsError

ROOT = Path(__file__).resolve().parent.parent
"""The worker's folder. Relative paths in the environment start here, so that no command depends on where it is run."""


MODES = ("image", "video", "svi_endframe")
"""Those of schemas.input_schema, which the bake, that reads settings too, does without."""


class Secret(str):
    """A string that no `repr` shows, so no dump of the settings; written out on purpose, it is itself."""

    def __repr__(self) -> str:
        return "Secret('***')"


def _path(text: str) -> Path:
    return (ROOT / Path(text).expanduser()).resolve()


def _hosts(text: str) -> tuple[str, ...]:
    names = tuple(name for name in (part.strip() for part in text.split(",")) if name)
    parse_allowed(names)
    return names


def _modes(text: str) -> tuple[str, ...]:
    """Each a mode, or a mode and one of its models with a colon between."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not {name.partition(":")[0] for name in names} <= set(MODES):
        raise ValueError("not a mode")
    return names


def _positive_int(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise ValueError("not positive")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise ValueError("not positive")
    return value


def _bound(text: str) -> float | None:
    return None if float(text) == 0 else _positive_float(text)


def _switch(text: str) -> bool:
    try:
        return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
    except KeyError:
        raise ValueError("not a switch") from None


def _setting(variable: str, cast: Callable[[str], Any], expects: str, default: Any, doc: str) -> Any:
    return field(default=default, metadata={"variable": variable, "cast": cast, "expects": expects, "doc": doc})


@dataclass(frozen=True)
class Settings:
    """The environment as the worker uses it. Units are in the names; a field's metadata documents its variable."""

    weights_dir: Path | None = _setting(
        "WORKER_WEIGHTS_DIR",
        _path,
        "a folder",
        None,
        "Where the baked profiles are. Unset: the image's own weights, the RunPod cached model, the network volume.",
    )
    output_dir: Path = _setting(
        "WORKER_OUTPUT_DIR", _path, "a folder", ROOT / "output", "Where files go when no S3 settings are given."
    )
    outbox_dir: Path = _setting(
        "WORKER_OUTBOX_DIR",
        _path,
        "a folder",
        ROOT / "outbox",
        "Where a finished file waits while the store is out; put it on a volume to survive the worker.",
    )
    vram_gib: float | None = _setting(
        "WORKER_VRAM_GIB", _positive_float, "a number of GiB", None, "Use at most this much of the card's memory."
    )
    max_work_gpx: float | None = _setting(
        "WORKER_MAX_WORK",
        _bound,
        "a number of gigapixels, or 0",
        25.0,
        "Most work of one request: pixels of a frame x frames of all clips x forwards (a guided step is two), in "
        "gigapixels. A default video is 2.6, a default svi_endframe 0.2, an image 0.1. 0: no bound.",
    )
    fetch_timeout_s: float = _setting(
        "WORKER_FETCH_TIMEOUT_S",
        _positive_float,
        "seconds",
        20.0,
        "Wall-clock budget of one URL: name, connect, headers and body together.",
    )
    fetch_max_mib: float = _setting(
        "WORKER_FETCH_MAX_MIB",
        _positive_float,
        "a number of MiB",
        20.0,
        "Largest picture or video read from a URL or base64.",
    )
    fetch_allow: tuple[str, ...] = _setting(
        "WORKER_FETCH_ALLOW",
        _hosts,
        "host names or networks, separated by commas",
        (),
        "Private hosts or networks that pictures and request-level S3 endpoints may be on.",
    )
    deadline_s: float | None = _setting(
        "WORKER_DEADLINE_S",
        _positive_float,
        "seconds",
        None,
        "Soft time limit of a job, to answer before the platform's own limit ends it.",
    )
    response_limit_bytes: int = _setting(
        "WORKER_RESPONSE_LIMIT_BYTES",
        _positive_int,
        "a number of bytes",
        9_500_000,
        "Largest response. RunPod drops results over 10 MB (/run) or 20 MB (/runsync).",
    )
    warm_up: tuple[str, ...] = _setting(
        "WORKER_WARM_UP",
        _modes,
        f"modes ({', '.join(MODES)}), separated by commas",
        (),
        "On RunPod, run a short job of each, with its default model or that of `mode:model_type`, before the first one "
        "is taken: that one then waits for no import, load or compiler. A worker that cannot do it ends as unhealthy: "
        "where weights are missing, or WORKER_MAX_WORK refuses it. Raise RUNPOD_INIT_TIMEOUT if it takes minutes.",
    )
    compile: bool = _setting(
        "WORKER_COMPILE", _switch, "1 or 0", True, "Compile transformer blocks, replay SDXL's forwards, on a card."
    )
    precision: str | None = _setting(
        "WORKER_PRECISION",
        str,
        "bf16, fp8 or int8",
        None,
        "Weights of the video transformers and, in 8 bits, of their text encoder. Unset: what is baked, bf16 first.",
    )
    attention: str | None = _setting(
        "WORKER_ATTENTION",
        str,
        "a name from docs/performance.md",
        None,
        "Attention kernel. Unset: the fastest that passes its self-test on this card.",
    )
    cache_dir: Path | None = _setting(
        "WORKER_CACHE_DIR", _path, "a folder", None, "Where compiled graphs and kernels are kept between workers."
    )
    bucket_endpoint_url: str | None = _setting(
        "BUCKET_ENDPOINT_URL", str, "a URL", None, "S3 endpoint, with or without the bucket in it."
    )
    bucket_access_key_id: Secret | None = _setting("BUCKET_ACCESS_KEY_ID", Secret, "a key id", None, "S3 access key.")
    bucket_secret_access_key: Secret | None = _setting(
        "BUCKET_SECRET_ACCESS_KEY", Secret, "a key", None, "S3 secret key."
    )
    bucket_name: str | None = _setting(
        "BUCKET_NAME", str, "a bucket", None, "The bucket, when the endpoint does not hold it."
    )
    bucket_region: str | None = _setting(
        "BUCKET_REGION", str, "a region", None, "Unset: read from the endpoint, else us-east-1 (R2: auto)."
    )
    bucket_prefix: str = _setting("BUCKET_PREFIX", str, "a key prefix", "worker", "First part of every key.")
    bucket_url_expiry_s: int = _setting(
        "BUCKET_URL_EXPIRY_S",
        _positive_int,
        "seconds, at most 604800",
        86_400,
        "Life of the returned URL. 7 days is SigV4's own limit.",
    )
    bucket_retry_s: float = _setting(
        "BUCKET_RETRY_S",
        _positive_float,
        "seconds",
        180.0,
        "How long the finished files of a job are offered to a failing store before they stay in the outbox.",
    )
    in_cloud: bool = _setting(
        "RUNPOD_WEBHOOK_GET_JOB", bool, "set by RunPod", False, "Set by RunPod itself: this process takes jobs."
    )
    in_endpoint: bool = _setting(
        "RUNPOD_ENDPOINT_ID", bool, "set by RunPod", False, "Set by RunPod itself: logs are JSON lines."
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> "Settings":
        """Read every variable (of this process, unless given), refuse every bad, unknown or half-given one.

        Raises:
            SettingsError: names the variable, its value unless secret, and what would be right.
        """
        environ = os.environ if environ is None else environ
        known = {f.metadata["variable"]: f for f in fields(cls)}
        _refuse_unknown(environ, known)
        values = {}
        for variable, setting in known.items():
            text = environ.get(variable, "").strip()
            if text:
                values[setting.name] = _cast(variable, text, setting.metadata)
        settings = cls(**values)
        settings._refuse_half_set()
        return settings

    @property
    def has_bucket(self) -> bool:
        return self.bucket_endpoint_url is not None

    def _refuse_half_set(self) -> None:
        needed = {
            "BUCKET_ENDPOINT_URL": self.bucket_endpoint_url,
            "BUCKET_ACCESS_KEY_ID": self.bucket_access_key_id,
            "BUCKET_SECRET_ACCESS_KEY": self.bucket_secret_access_key,
        }
        missing = [name for name, value in needed.items() if value is None]
        if missing and (len(missing) < len(needed) or self.bucket_name is not None):
            raise SettingsError(f"S3 is half set: {' and '.join(missing)} missing; set all of it or none")
        if self.bucket_url_expiry_s > 604_800:
            raise SettingsError("BUCKET_URL_EXPIRY_S is over 604800: a SigV4 URL lives at most 7 days")
        if self.precision not in (None, "bf16", "fp8", "int8"):
            raise SettingsError(f"WORKER_PRECISION is {self.precision!r}, not bf16, fp8 or int8")


IMAGE_KERNELS = ROOT / "kernels"
"""What builder/compile_kernels.py has written, laid out as keep_kernels has it, and builder/list_models.py beside it.
Not the image's WORKER_CACHE_DIR: where the root file system is read-only, a mount hides that."""
CUTE_DIR = "SVI_WORKER_CUTE_DIR"  # the variable behind cute_dir


def keep_kernels(folder: Path) -> bool:
    """Let Triton, flash-attn-4 and engine.hopper_kernels keep in `folder` what they compile, if it can be written.

    The first two listen to the environment alone, flash-attn-4 when it is imported: call it before. Neither compiles
    anything where it cannot write. Returns whether they do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    if not os.access(folder, os.W_OK):
        return False
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "1"
    os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] = str(folder / "flash4")
    os.environ[CUTE_DIR] = str(folder / "cute")
    return True


def cute_dir() -> Path | None:
    """Where engine.hopper_kernels keeps what it compiles; None: nowhere."""
    folder = os.environ.get(CUTE_DIR)
    return None if folder is None else Path(folder)


def _cast(variable: str, text: str, metadata: Mapping[str, Any]) -> Any:
    try:
        return metadata["cast"](text)
    except (ValueError, OverflowError, RuntimeError):  # the last: `~nobody`, or a link that leads to itself
        raise SettingsError(f"{variable} is {text!r}, not {metadata['expects']}") from None


def _refuse_unknown(environ: Mapping[str, str], known: Mapping[str, Any]) -> None:
    for name in environ:
        if name.startswith(("WORKER_", "BUCKET_")) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise SettingsError(f"{name} is not a setting" + (f"; did you mean {near[0]}?" if near else ""))
