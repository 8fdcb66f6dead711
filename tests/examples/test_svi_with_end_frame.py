"""The example: what its options ask for, a job on this machine, and a job on an endpoint on loopback."""

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from examples import runpod_endpoint
from examples.runpod_endpoint import Endpoint, EndpointFailed
from examples.svi_with_end_frame import Unusable, fetched, main, parser, request_for
from tests.conftest import decode_video, photo

MP4 = b"not really an MP4"
MADE = {"num_frames": 5, "width": 64, "height": 48, "seed": 7, "warnings": ["a note"], "size_bytes": len(MP4)}
STEP = {"stage": "denoise", "step": 3, "total": 6, "percent": 50.0, "eta_s": 4.2}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """start.png, end.png, and video.mp4: 12 frames, each of one grey that tells which it is."""
    folder = tmp_path_factory.mktemp("media")
    photo().save(folder / "start.png")
    photo(seed=1).save(folder / "end.jpg")
    with av.open(str(folder / "video.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for i in range(12):
            grey = np.full((96, 128, 3), 20 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    return folder


def asked(media: Path, *arguments: str) -> dict[str, Any]:
    """The request that the options make."""
    return request_for(parser().parse_args(["--end", str(media / "end.jpg"), *arguments]))


def grey_of(uri: str) -> int:
    """Which frame of video.mp4 a PNG shows."""
    from engine.pictures import decode_picture

    picture = decode_picture(base64.b64decode(uri.removeprefix("data:image/png;base64,")))
    return round(float(np.asarray(picture).mean()) / 20)


def test_options_have_the_defaults_of_the_published_script() -> None:
    options = parser().parse_args([])
    assert (options.frames, options.num_start_frames, options.use_regular_i2v) == (81, 3, False)
    assert (options.anchor, options.dry_run, options.endpoint) == (None, False, None)


def test_dry_run_prints_the_request_and_elides_its_media(media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start, end = str(media / "start.png"), str(media / "end.jpg")
    assert main(["--start", start, "--end", end, "--anchor", end, "--seed", "7", "--prompt", "dusk", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "mode": "svi_endframe",
        "model_type": "wan_2_2_i2v_lightning_svi_3_3",
        "image_start": f"<image/png, {(media / 'start.png').stat().st_size:,} bytes>",
        "image_end": f"<image/jpeg, {(media / 'end.jpg').stat().st_size:,} bytes>",
        "image_refs": [f"<image/jpeg, {(media / 'end.jpg').stat().st_size:,} bytes>"],
        "prompt": "dusk",
        "video_length": 81,
        "seed": 7,
    }
    assert err == "note: layout svi_latent starts on the anchor in image_refs, not on image_start\n"


def test_files_are_sent_byte_for_byte(media: Path) -> None:
    request = asked(media, "--start", str(media / "start.png"))
    for name, file in (("image_start", "start.png"), ("image_end", "end.jpg")):
        assert base64.b64decode(request[name].partition(",")[2]) == (media / file).read_bytes()


def test_urls_are_handed_on_as_they_are(media: Path) -> None:
    request = asked(media, "--start", "https://example.com/a.png", "--anchor", "https://example.com/b.png")
    assert request["image_start"] == "https://example.com/a.png"
    assert request["image_refs"] == ["https://example.com/b.png"]
    assert "seed" not in request


def test_few_start_frames_begin_on_the_oldest_and_say_that_there_is_no_motion(
    media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = asked(media, "--start", str(media / "video.mp4"))
    assert grey_of(request["image_start"]) == 9  # the last 3 of 12 are 9, 10, 11
    assert "prefix_video" not in request
    assert capsys.readouterr().err.startswith("3 start frames carry no motion, that takes 9")


def test_nine_start_frames_go_on_from_the_video(media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = asked(media, "--start", str(media / "video.mp4"), "--num-start-frames", "9")
    assert (
        base64.b64decode(request["prefix_video"].removeprefix("data:video/mp4;base64,"))
        == (media / "video.mp4").read_bytes()
    )
    assert "image_start" not in request
    assert capsys.readouterr().err.startswith("going on from the newest 9 frames")


@pytest.mark.parametrize("url", ["https://example.com/clip.mp4", "https://example.com/clip.MP4?X-Signature=ab.png#t"])
def test_video_behind_a_url_is_gone_on_from(media: Path, url: str) -> None:
    assert asked(media, "--start", url, "--num-start-frames", "9")["prefix_video"] == url
    with pytest.raises(Unusable, match="single frames are taken from files only"):
        asked(media, "--start", url)


def test_regular_i2v_takes_each_start_frame_in_its_pixel_layout(media: Path) -> None:
    request = asked(media, "--start", str(media / "video.mp4"), "--use-regular-i2v")
    assert (request["model_type"], request["svi2pro"]) == ("wan_2_2_i2v_lightning_svi_endframe", False)
    assert [grey_of(uri) for uri in request["image_start"]] == [9, 10, 11]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--frames 80", "video_length: must be 4k + 1, got 80; the nearest are 77 and 81"),
        ("--start nowhere.png", "nowhere.png cannot be read: No such file or directory"),
        (f"--start {__file__}", f"{__file__} is no PNG, JPEG or WebP picture and no MP4, MOV, WebM or Matroska video"),
        ("--start VIDEO --num-start-frames 10 --use-regular-i2v", "--num-start-frames must be at most 9"),
        ("--start VIDEO --num-start-frames 0", "--num-start-frames must be at least 1, got 0"),
        ("--start VIDEO --frames 85 --use-regular-i2v", "layout: flf makes one clip of at most 81 frames"),
        ("--endpoint abc123", "RUNPOD_API_KEY is not set"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    media: Path, arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--start", str(media / "start.png"), "--end", str(media / "end.jpg")]
    assert main([*given, *arguments.replace("VIDEO", str(media / "video.mp4")).split()]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(f"error: {sentence}")


def test_job_runs_on_this_machine(
    media: Path, twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORKER_WEIGHTS_DIR", str(twins))
    given = ["--start", str(media / "start.png"), "--end", str(media / "end.jpg"), "--frames", "5", "--seed", "7"]
    assert main([*given, "--output-dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    path = Path(out.removesuffix("\n"))
    assert path.is_relative_to(tmp_path)
    assert decode_video(path).shape == (5, 80, 112, 3)
    stages = [line.split(" % ")[1].split()[0] for line in err.splitlines() if line.startswith("[")]
    assert stages == ["fetch", "load", "encode", "denoise", "decode", "upload"]
    assert err.splitlines()[-1] == "5 frames of 112x80, seed 7"


def test_job_goes_on_from_a_video_on_this_machine(
    media: Path, twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORKER_WEIGHTS_DIR", str(twins))
    given = ["--start", str(media / "video.mp4"), "--num-start-frames", "9", "--end", str(media / "end.jpg")]
    assert main([*given, "--frames", "9", "--output-dir", str(tmp_path)]) == 0
    assert len(decode_video(capsys.readouterr().out.rstrip())) == 4  # 9, less the 5 that the video has shown


@dataclass
class FakeRunPod:
    """RunPod's job API as a client sees it: each poll takes the next of `polls`, an answer or an HTTP status."""

    polls: list[dict[str, Any] | int | bytes]
    """What /status answers: an object, a status without one, or a body that is no JSON."""
    cancel_status: int = 200
    run_status: int = 200
    seen: list[tuple[str, str | None, Any]] = field(default_factory=list)
    """(method and path, Authorization, body) of each request."""

    def __enter__(self) -> "FakeRunPod":
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                return

            def do_GET(self) -> None:
                fake._note(self, None)
                if self.path == "/video.mp4":
                    self._reply(200, MP4)
                    return
                poll = fake.polls.pop(0)
                if isinstance(poll, int):
                    self._reply(poll, b"{}")
                else:
                    self._reply(200, poll if isinstance(poll, bytes) else json.dumps(poll).encode())

            def do_POST(self) -> None:
                fake._note(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status = fake.cancel_status if self.path.startswith("/cancel") else fake.run_status
                self._reply(status, b'{"id": "job-1", "status": "IN_QUEUE"}')

            def _reply(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _note(self, request: BaseHTTPRequestHandler, body: Any) -> None:
        self.seen.append((f"{request.command} {request.path}", request.headers["Authorization"], body))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def done(self) -> dict[str, Any]:
        return {"status": "COMPLETED", "output": {**MADE, "video_url": f"{self.url}/video.mp4"}}

    def run(self) -> dict[str, Any]:
        """A job on this endpoint, whose progress nobody looks at."""
        return Endpoint(self.url, "key").run({"mode": "svi_endframe"}, 1800, lambda _update: None)


@pytest.fixture
def runpod(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRunPod]:
    monkeypatch.setattr(runpod_endpoint, "POLL_S", 0.0)
    with FakeRunPod([]) as fake:
        yield fake


def test_job_runs_on_an_endpoint(
    runpod: FakeRunPod, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_key")
    runpod.polls = [{"status": "IN_QUEUE"}, {"status": "IN_PROGRESS", "output": STEP}, runpod.done()]
    given = ["--start", str(media / "start.png"), "--end", str(media / "end.jpg"), "--timeout-s", "900"]
    assert main([*given, "--endpoint", runpod.url, "--output-dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert Path(out.rstrip()).read_bytes() == MP4
    assert err.splitlines() == [
        "[###############...............]  50.0 % denoise 3/6, 4 s to go",
        "5 frames of 64x48, seed 7",
        "note: a note",
    ]
    assert [(call, key) for call, key, _ in runpod.seen] == [
        ("POST /run", "Bearer rpa_key"),
        *[("GET /status/job-1", "Bearer rpa_key")] * 3,
        ("GET /video.mp4", None),  # the store is another host: the key is none of its business
    ]
    posted = runpod.seen[0][2]
    assert posted["policy"] == {"executionTimeout": 900_000}
    assert posted["input"] == request_for(parser().parse_args(given))


def test_endpoint_is_named_by_its_id_or_its_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_key")
    assert Endpoint.named("abc123").url == "https://api.runpod.ai/v2/abc123"
    assert Endpoint.named("http://127.0.0.1:8000/").url == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("ended", "sentence"),
    [
        (
            {"status": "FAILED", "error": "fetch_failed: the picture could not be read"},
            "fetch_failed: the picture could",
        ),
        ({"status": "TIMED_OUT"}, "the job ended as TIMED_OUT"),
        ({"status": "CANCELLED"}, "the job ended as CANCELLED"),
        (404, "job job-1 cannot be followed any more: HTTP Error 404"),
        (401, "job job-1 cannot be followed any more: HTTP Error 401"),
    ],
)
def test_job_without_a_result_says_why(runpod: FakeRunPod, ended: dict[str, Any] | int, sentence: str) -> None:
    runpod.polls = [ended]
    with pytest.raises(EndpointFailed, match=sentence):
        runpod.run()


def test_polls_that_fail_are_tried_again_but_not_for_ever(runpod: FakeRunPod) -> None:
    runpod.polls = [*[502] * 9, {"status": "IN_QUEUE"}, *[429] * 8, b"<html>a gateway's page", runpod.done()]
    assert runpod.run()["seed"] == 7
    runpod.polls = [502] * 10
    with pytest.raises(EndpointFailed, match="cannot be followed any more: HTTP Error 502"):
        runpod.run()
    assert runpod.polls == []


def test_endpoint_that_refuses_the_job_is_not_polled(runpod: FakeRunPod) -> None:
    runpod.run_status = 401
    with pytest.raises(EndpointFailed, match="did not take the job: HTTP Error 401"):
        runpod.run()
    assert [call for call, _, _ in runpod.seen] == ["POST /run"]


def test_request_over_runpods_limit_is_not_sent(runpod: FakeRunPod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runpod_endpoint, "MAX_BODY_BYTES", 50)
    with pytest.raises(EndpointFailed, match="RunPod takes 10; give large media as URLs"):
        runpod.run()
    assert runpod.seen == []


def test_ctrl_c_takes_the_job_back(runpod: FakeRunPod) -> None:
    runpod.polls = [{"status": "IN_PROGRESS", "output": STEP}]

    def interrupted(update: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Endpoint(runpod.url, "key").run({}, 1800, interrupted)
    assert runpod.seen[-1][0] == "POST /cancel/job-1"


def test_ctrl_c_that_cannot_take_the_job_back_says_that_it_may_still_run(runpod: FakeRunPod) -> None:
    runpod.polls, runpod.cancel_status = [{"status": "IN_PROGRESS", "output": STEP}], 502

    def interrupted(update: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(EndpointFailed, match="job job-1 could not be taken back and may still run: HTTP Error 502"):
        Endpoint(runpod.url, "key").run({}, 1800, interrupted)


def test_video_inside_the_response_is_written_out(tmp_path: Path) -> None:
    inline = f"data:video/mp4;base64,{base64.b64encode(MP4).decode()}"
    assert Path(fetched({**MADE, "video_url": inline}, tmp_path / "new")).read_bytes() == MP4


def test_video_cut_short_on_its_way_is_not_kept(tmp_path: Path) -> None:
    cut = f"data:video/mp4;base64,{base64.b64encode(MP4[:-1]).decode()}"
    with pytest.raises(Unusable, match="came with 16 of 17 bytes"):
        fetched({**MADE, "video_url": cut}, tmp_path)
    assert list(tmp_path.iterdir()) == []
