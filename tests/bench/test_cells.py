"""One job in a process of its own: what its clock runs over."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import cells, jobs
from bench.ours import Arm
from bench.watch import Watch
from engine.settings import Settings


@pytest.fixture
def arm(twins: Path) -> Iterator[Arm]:
    """Tiny and warm."""
    jobs.picture.cache_clear()
    made = Arm("svi_endframe", Settings(weights_dir=twins), twins, Watch(), is_small=True)
    made.run()
    yield made
    made.close()


@pytest.mark.parametrize(("asked", "clock"), [("job", "sample"), ("trace", "trace")])
def test_pictures_of_a_job_are_drawn_before_its_clock_begins(
    arm: Arm, asked: str, clock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty milliseconds of the bench's own would pass for the worker's."""
    seen: list[str] = []
    from_array = jobs.Image.fromarray
    monkeypatch.setattr(jobs.Image, "fromarray", lambda levels: seen.append("picture") or from_array(levels))

    def clocked(run: Any, *_: Any) -> None:
        seen.append("clock")
        run()
        raise InterruptedError

    monkeypatch.setattr(cells, clock, clocked)
    with pytest.raises(InterruptedError):
        getattr(cells._Jobs, asked)(SimpleNamespace(arm=arm, watch=Watch()), None, None)
    assert seen == ["picture", "picture", "clock"]


def test_film_of_a_job_is_deleted_after_its_clock_has_stopped(arm: Arm) -> None:
    films = Path(arm._films.name)
    assert [path.name for path in films.rglob("*.mp4")] == ["video.mp4"]
    arm.draw()
    assert list(films.iterdir()) == []
    arm.close()
    assert not films.exists()
