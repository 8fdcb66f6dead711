"""One whole job on this machine: two photographs in as base64, an MP4 out, through handler.py and RunPod's own SDK.

Run by `make demo`, which points WORKER_WEIGHTS_DIR at the tiny twins. The last line printed is the response.
"""

import base64
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "examples" / "pictures"


def data_uri(path: Path) -> str:
    """A picture as clients send it."""
    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"


def main() -> int:
    job = {
        "input": {
            "mode": "svi_endframe",
            "prompt": "clouds drift over the lake while the light turns to evening",
            "image_start": data_uri(PICTURES / "start.jpg"),
            "image_end": data_uri(PICTURES / "end.jpg"),
            "resolution": "208x112",
            "video_length": 41,
            "seed": 12345,
        }
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        done = subprocess.run(
            [sys.executable, ROOT / "handler.py", "--test_input", file.name], stdout=subprocess.PIPE, text=True
        )
    answer = done.stdout.rstrip().splitlines()[-1] if done.stdout.strip() else "{}"
    response = json.loads(answer)
    if "video_url" in response:
        print(f"the video is at {response['video_url']}")
    print(json.dumps(response))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
