"""Whether the operator's store works, asked once at start: better no worker than a lost video."""

import hashlib
import logging
from contextlib import suppress

from engine import outbox
from engine.bucket import bucket_from_settings
from engine.s3 import Objects, Patience, connect
from engine.s3_errors import KeyTaken, StoreRefused
from engine.settings import Settings
from schemas.errors import SettingsError

CHECK_S = 15.0
"""Patience of the whole check; a platform that starts workers waits minutes, not hours."""
SKEW_WARN_S = 300.0
SKEW_MAX_S = 900.0
"""Source: AWS SigV4: a request more than 15 minutes off is refused with RequestTimeTooSkewed."""
CONTENT = b"Written by a worker to see whether it can.\n"

_log = logging.getLogger(__name__)


def check_store(settings: Settings) -> None:
    """Write, verify and open an object as a job would; look at the clock and the outbox. Nothing without S3.

    Leaves one small object, `<prefix>/check.txt`, which every start finds and verifies again.

    Raises:
        SettingsError: what the operator must change, in one sentence.
        DeliveryFailed: the store is out; the next start may find it well.
    """
    if not settings.has_bucket:
        return
    bucket = bucket_from_settings(settings)
    outbox.prepare(settings.outbox_dir)
    patience = Patience.lasting(CHECK_S)
    try:
        objects = connect(bucket)
        _check_clock(objects.clock_skew_s(patience))
        key = "/".join(part for part in (settings.bucket_prefix.strip("/"), "check.txt") if part)
        _check_write(objects, key, patience)
        # Signed for as long as a result's: a short life and a clock that is behind make a URL that never opens.
        if objects.open_signed(key, settings.bucket_url_expiry_s, patience) != CONTENT:
            # RunPod's own network volume API, for one, has no signed URLs.
            raise SettingsError(
                "the store opens no signed URLs, so nobody could fetch a result; check BUCKET_ENDPOINT_URL"
            )
    except StoreRefused as error:
        raise SettingsError(error.sentence) from error
    _log.info("the store takes files")


def _check_clock(skew_s: float) -> None:
    direction = "ahead of" if skew_s > 0 else "behind"
    sentence = f"this worker's clock is {abs(skew_s) / 60:.0f} min {direction} the store's"
    if abs(skew_s) > SKEW_MAX_S:
        raise SettingsError(f"{sentence}; the store refuses more than 15")
    if abs(skew_s) > SKEW_WARN_S:
        _log.warning("%s; from 15 on the store refuses", sentence)


def _check_write(objects: Objects, key: str, patience: Patience) -> None:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    with suppress(KeyTaken):
        objects.create(key, CONTENT, "text/plain", sha256, patience)
    if objects.head(key, patience).sha256 != sha256:
        raise SettingsError(f"the store keeps no metadata of {key}, or another program uses this prefix")
    if objects.read(key, len(CONTENT) + 1, patience) != CONTENT:
        raise SettingsError(f"the store does not give back what it took as {key}")
