"""Draw docs/figures: a picture of each layout and one of a chain, from what the code itself makes of them.

Nothing is drawn from a table: `condition` is given tags in place of pixels and a tape in place of the VAE, and
what comes out says which picture stands where. `plan` says which frames are decoded and kept.

python builder/draw_layouts.py
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from any folder

from engine.chain import Clip, Wish, plan  # noqa: E402 after the path is set
from engine.conditioning import LAYOUTS, Given, condition  # noqa: E402

FRAMES = 17  # of the clips drawn: as short as shows all there is to see
CHAIN_FRAMES = 233  # three whole clips, each as long as a clip may be

TAGS = {"anchor": 0.25, "start": 0.5, "end": 0.75, "grey": 0.0}
"""Pixel values by which a frame is known again; zero pixels are grey."""

COLOURS = {
    "anchor": "#2f7d5b",
    "start": "#2d6cb5",
    "end": "#d9822b",
    "grey": "#b9bec6",
    "zero": "#ffffff",
    "motion": "#7a52a8",
    "known": "#22262e",
    "made": "#e8eef7",
    "again": "#f6d9d9",
}
INK, FAINT = "#22262e", "#8a919c"

CAPTIONS = {
    "svi": "the anchor, then nothing: the film ends where it will",
    "svi_latent": "the anchor, exact zeros, and the end as a latent of its own that is decoded alone",
    "svi_upstream": "as svi_latent, with one known sub-frame at the end and one stream for the decoder",
    "svi_pixel4": "start and four end frames around grey ones, encoded in one pass",
    "flf": "start, grey frames, end, encoded in one pass: plain image-to-video with a last picture",
    "kijai_end": "flf's start, then the end as one latent more, which is decoded alone",
}

LEFT, CELL, SUB = 96, 96, 24
"""Pixels of the drawing: the margin of the row's names, a latent frame, a sub-frame."""


@dataclass
class Tape:
    """Stands in for the VAE's encoder. `passes`: the tag of each frame in each pass."""

    passes: list[list[str]] = field(default_factory=list)
    latents: list[list[str]] = field(default_factory=list)

    def encode(self, pixels: Any) -> Any:
        """Note the frames (1, 1, F, 1, 1) and give each latent frame its number, counted from 1."""
        import torch

        names = {value: name for name, value in TAGS.items()}
        tags = [names[value] for value in pixels[0, 0, :, 0, 0].tolist()]
        self.passes.append(tags)
        groups = [tags[:1], *(tags[i : i + 4] for i in range(1, len(tags), 4))]
        numbers = torch.arange(len(groups)) + len(self.latents) + 1
        self.latents += groups
        return numbers.float().view(1, 1, -1, 1, 1)


@dataclass(frozen=True)
class Shown:
    """A layout's condition, read back. Each latent frame: the tags of its pixel frames, [] for exact zeros."""

    clip: Clip
    mask: list[list[bool]]
    latents: list[list[str]]
    passes: list[list[str]]


def read_layout(name: str) -> Shown:
    """The condition that the engine builds for a clip of FRAMES frames in this layout."""
    import torch

    (clip,) = plan(Wish(frames=FRAMES, prompts=("",), seed=0, layout=name))
    tagged = {tag: torch.full((1, 1, 1, 1, 1), value) for tag, value in TAGS.items()}
    end = tagged["end"] if LAYOUTS[name].needs_end else None
    tape = Tape()
    y = condition(name, clip.latent_frames, Given(tagged["anchor"], tagged["start"], end), tape.encode)
    numbers = [int(number) for number in y[0, 4, :, 0, 0].tolist()]
    return Shown(
        clip,
        [[bool(known) for known in group] for group in y[0, :4, :, 0, 0].T.tolist()],
        [tape.latents[number - 1] if number else [] for number in numbers],
        tape.passes,
    )


def draw_layout(name: str) -> str:
    """One layout as SVG: what the transformer is shown, and what becomes of the frames."""
    shown = read_layout(name)
    width = LEFT + CELL * len(shown.latents) + 110
    parts = [
        text(12, 26, name, size=17, weight=600),
        text(12, 46, CAPTIONS[name], colour=FAINT),
        *_mask_row(shown, 66),
        *_latent_row(shown, 100),
        *_frame_row(shown, 192),
        *_legend(sorted({tag for group in shown.latents for tag in group or ["zero"]}, key=list(COLOURS).index), 264),
    ]
    return svg(width, 286, parts)


def _mask_row(shown: Shown, y: int) -> Iterator[str]:
    yield text(12, y + 14, "known")
    for t, group in enumerate(shown.mask):
        for i, known in enumerate(group):
            yield box(LEFT + CELL * t + SUB * i, y, SUB - 2, 18, COLOURS["known" if known else "zero"])


def _latent_row(shown: Shown, y: int) -> Iterator[str]:
    yield text(12, y + 27, "condition")
    for t, group in enumerate(shown.latents):
        tags = group or ["zero"]
        share = (CELL - 2) / len(tags)
        for i, tag in enumerate(tags):
            yield box(LEFT + CELL * t + share * i, y, share, 44, COLOURS[tag], outline=tag == "zero")
        label = "0" if not group else tags[0] if len(set(tags)) == 1 else ""
        if label:
            colour = INK if label in ("0", "grey") else "#ffffff"
            yield text(LEFT + CELL * t + CELL / 2 - 1, y + 27, label, colour=colour, anchor="middle")
    position = 0
    for frames in shown.passes:
        position = next(t for t in range(position, len(shown.latents)) if shown.latents[t])
        count = (len(frames) - 1) // 4 + 1
        x, right = LEFT + CELL * position, LEFT + CELL * (position + count) - 2
        what = "1 picture alone" if len(frames) == 1 else f"{len(frames)} frames in one pass"
        yield from bracket(x, right, y + 50, what)
        position += count


def _frame_row(shown: Shown, y: int) -> Iterator[str]:
    """The decoded frames under the latents they come from; a crossed one is left out of the file."""
    clip = shown.clip
    yield text(12, y + 16, "frames")
    for i in range(clip.decoded_frames):
        is_alone = LAYOUTS[clip.layout].end_alone and i == clip.decoded_frames - 1
        t, offset = (len(shown.latents) - 1, 0) if is_alone else (0, 0) if i == 0 else ((i + 3) // 4, (i + 3) % 4)
        x = LEFT + CELL * t + SUB * offset
        yield box(x, y, SUB - 2, 22, COLOURS["end"] if is_alone else COLOURS["made"])
        if i not in clip.kept:
            yield line([(x, y), (x + SUB - 2, y + 22)], INK)
            yield line([(x, y + 22), (x + SUB - 2, y)], INK)
    alone = CELL * LAYOUTS[clip.layout].end_alone
    right = LEFT + CELL * len(shown.latents) - 2
    yield from bracket(LEFT, right - alone, y + 28, "decoded in one stream")
    if alone:
        yield from bracket(right + 2 - alone, right, y + 28, "decoded alone")
    yield text(right + 10, y + 16, f"{len(clip.kept)} frames")


def draw_chain() -> str:
    """Three clips of one film on its time axis, as SVG."""
    clips = plan(Wish(frames=CHAIN_FRAMES, prompts=("",), seed=0, layout="svi_latent"))
    total = sum(len(clip.kept) for clip in clips)
    scale = 3
    parts = [
        text(12, 26, f"a chain of {len(clips)} clips: {total} frames", size=17, weight=600),
        text(12, 46, "each clip renders the anchor and the last motion again; those frames are dropped", colour=FAINT),
    ]
    begin = 0  # of the clip's kept frames in the film
    for i, clip in enumerate(clips):
        x, y = LEFT + scale * (begin - clip.drop), 66 + 48 * i
        right = x + scale * (clip.drop + len(clip.kept))
        parts += [
            text(12, y + 17, f"clip {clip.index}"),
            box(x, y, scale * clip.drop, 26, COLOURS["again"]),
            box(x + scale * clip.drop, y, scale * len(clip.kept), 26, COLOURS["made"]),
            box(x, y, 5, 26, COLOURS["anchor"]),
            text(
                x + scale * clip.drop + 8,
                y + 17,
                f"{clip.layout}, seed + {clip.seed}, {len(clip.kept)} frames",
                size=12,
            ),
        ]
        if clip.drop:
            parts.append(text(x - 6, y + 17, f"{clip.drop} dropped", size=11, colour=FAINT, anchor="end"))
        if LAYOUTS[clip.layout].needs_end:
            parts.append(box(right - 5, y, 5, 26, COLOURS["end"]))
        else:
            parts += [
                box(right - 10, y, 10, 26, COLOURS["motion"]),
                line([(right - 5, y + 26), (right - 5, y + 48)], COLOURS["motion"]),
            ]
        begin += len(clip.kept)
    parts += _legend(["anchor", "motion", "end", "again"], 66 + 48 * len(clips) + 10)
    return svg(LEFT + scale * total + 24, 66 + 48 * len(clips) + 30, parts)


def _legend(names: list[str], y: int) -> Iterator[str]:
    meanings = {
        "zero": "exact zeros",
        "grey": "zero pixels, encoded",
        "motion": "last latent, handed on",
        "again": "shown before",
    }
    x = LEFT
    for name in names:
        meaning = meanings.get(name, name)
        yield box(x, y, 11, 11, COLOURS[name])
        yield text(x + 17, y + 10, meaning, size=11, colour=FAINT)
        x += 36 + 6 * len(meaning)


def svg(width: int, height: int, parts: list[str]) -> str:
    """A whole drawing on white, so that it is read on a dark page too."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">'
    )
    background = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, background, *parts, "</svg>", ""])


def box(x: float, y: float, width: float, height: float, fill: str, *, outline: bool = True) -> str:
    stroke = f' stroke="{FAINT}" stroke-width="0.7"' if outline else ""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{stroke}/>'


def line(points: list[tuple[float, float]], colour: str) -> str:
    joined = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.2"/>'


def bracket(x: float, right: float, y: float, words: str) -> Iterator[str]:
    yield line([(x, y), (x, y + 6), (right, y + 6), (right, y)], FAINT)
    yield text((x + right) / 2, y + 21, words, size=11, colour=FAINT, anchor="middle")


def text(
    x: float, y: float, words: str, *, size: int = 13, colour: str = INK, weight: int = 400, anchor: str = "start"
) -> str:
    look = f'font-size="{size}" fill="{colour}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {look}>{escape(words)}</text>'


def figures() -> dict[str, str]:
    """File name -> SVG, the same for the same code."""
    return {**{f"{name}.svg": draw_layout(name) for name in LAYOUTS}, "chain.svg": draw_chain()}


def main(folder: Path = ROOT / "docs" / "figures") -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in figures().items():
        (folder / name).write_text(drawing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
