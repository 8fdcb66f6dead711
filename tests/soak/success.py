"""Whether an answer that says success is true: the object stands, and is what the answer says."""

import hashlib
import io
from typing import Any
from urllib.parse import unquote, urlsplit

import av
from PIL import Image, UnidentifiedImageError

from tests.servers.buckets import client_of
from tests.servers.swift import Swift


def whole_objects(swift: Swift, bucket: str) -> dict[str, bytes]:
    """The objects of a bucket whose bytes have the SHA-256 that was sent with them, by key."""
    client, found = client_of(swift), {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for each in page.get("Contents", []):
            answer = client.get_object(Bucket=bucket, Key=each["Key"])
            body = answer["Body"].read()
            if answer["Metadata"].get("sha256") == hashlib.sha256(body).hexdigest():
                found[each["Key"]] = body
    return found


def key_of(output: dict[str, Any]) -> str:
    """The object's key, from a URL with the bucket in its path."""
    url = output.get("video_url") or output["image_url"]
    return unquote(urlsplit(url).path).split("/", 2)[-1]


def is_true(output: dict[str, Any], stored: dict[str, bytes], *, play: bool = True) -> bool:
    """`stored`: the whole objects of the bucket. `play`: decode it to the last frame."""
    body = stored.get(key_of(output))
    return body is not None and len(body) == output["size_bytes"] and (not play or plays(body, output))


def plays(body: bytes, output: dict[str, Any]) -> bool:
    try:
        if output["content_type"] == "video/mp4":
            with av.open(io.BytesIO(body)) as container:
                sizes = [(frame.height, frame.width) for frame in container.decode(video=0)]
            return sizes == [(output["height"], output["width"])] * output["num_frames"]
        with Image.open(io.BytesIO(body)) as image:
            image.load()
            return image.size == (output["width"], output["height"])
    except (av.error.FFmpegError, UnidentifiedImageError, OSError):
        return False
