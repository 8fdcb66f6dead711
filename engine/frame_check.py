"""What no viewer would take for a video: found while the frames pass, without holding them."""

from typing import Any

from engine.geometry import VideoShape
from schemas.errors import BadOutput

BLACK_LEVEL = 1  # of 255. A decoder's dark sky is noise of a few levels; a broken decode is exactly 0
BLACK_SHARE = 0.98
MIN_STD = 1.0  # levels; less than this over a whole video is one flat colour


class FrameCheck:
    """Looks at each chunk of a video as it comes, and says at the end if it is one.

    Three faults are told apart from legal but dull jobs. *Flat*: no frame has a contrast of a level, and
    their means differ by less than two. *Black*: in every frame at least 98 % of the pixels are 0 or 1.
    *Frozen*: more than one frame, all bit for bit the same. A still scene, a white page, a night sky and a
    fade of flat colours all pass, because a decoder's own noise and its warm-up over the first frames break
    each of the three. What is refused although it may be meant: a start picture that is itself 98 % pure
    black and stays so.

    Once a fault is disproved its test is skipped, so a normal video pays for about two frames.
    """

    def __init__(self, shape: VideoShape) -> None:
        self._shape = shape
        self._count = 0
        self._first: Any = None
        self._means: list[float] = []
        self._flat = self._black = True
        self._frozen = shape.frames > 1

    def add(self, chunk: Any) -> None:
        """Take (f, height, width, 3) uint8.

        Raises:
            BadOutput: another type, another size, or more frames than were asked for.
        """
        import numpy as np

        if not isinstance(chunk, np.ndarray) or chunk.dtype != np.uint8:
            raise BadOutput(f"the model made {getattr(chunk, 'dtype', type(chunk).__name__)} frames, not uint8")
        height, width = self._shape[1:]
        if chunk.ndim != 4 or chunk.shape[1:] != (height, width, 3) or not len(chunk):
            raise BadOutput(f"the model made frames of shape {chunk.shape}, not (f, {height}, {width}, 3)")
        self._count += len(chunk)
        if self._count > self._shape.frames:
            raise BadOutput(f"the model made {self._count} frames or more, not {self._shape.frames}")
        for frame in chunk:
            self._look(frame)

    def finish(self) -> None:
        """Raise BadOutput if frames are missing, or if all of them together are flat, black or frozen."""
        if self._count != self._shape.frames:
            raise BadOutput(f"the model made {self._count} frames, not {self._shape.frames}")
        if self._black:
            raise BadOutput("the model made a black video")
        if self._flat:
            raise BadOutput("the model made a video of one flat colour")
        if self._frozen:
            raise BadOutput("the model made the same frame over and over")

    def _look(self, frame: Any) -> None:
        if self._first is None:
            self._first = frame.copy()
        elif self._frozen:
            self._frozen = bool((frame == self._first).all())
        if self._black:
            self._black = float((frame <= BLACK_LEVEL).all(axis=-1).mean()) >= BLACK_SHARE
        if self._flat:
            self._means.append(float(frame.mean()))
            spread = max(self._means) - min(self._means)
            self._flat = float(frame.std()) < MIN_STD and spread < 2 * MIN_STD
