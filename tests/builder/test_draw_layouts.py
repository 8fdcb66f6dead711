"""The figures show what the engine builds."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from builder import draw_layouts
from builder.draw_layouts import draw_layout, figures, read_layout
from engine import conditioning
from engine.chain import Wish, plan

PAGE = (draw_layouts.ROOT / "docs" / "svi.md").read_text()
LETTERS = {"anchor": "A", "start": "S", "end": "E", "grey": "g"}


@pytest.mark.parametrize(
    ("name", "mask", "latents", "passes", "kept"),
    [
        ("svi", "1111 0000 0000 0000 0000", "A 0 0 0 0", [1], 17),
        ("svi_latent", "1111 0000 0000 0000 0000 1111", "A 0 0 0 0 E", [1, 1], 17),
        ("svi_upstream", "1111 0000 0000 0000 0001", "A 0 0 0 E", [1, 1], 17),
        ("svi_pixel4", "1111 0000 0000 0000 1111", "S gggg gggg gggg EEEE", [17], 17),
        ("flf", "1111 0000 0000 0000 0001", "S gggg gggg gggg gggE", [17], 17),
        ("kijai_end", "1111 0000 0000 0000 0000 1111", "S gggg gggg gggg gggg E", [17, 1], 17),
    ],
)
def test_layout_is_read_back_from_the_engine(name: str, mask: str, latents: str, passes: list[int], kept: int) -> None:
    shown = read_layout(name)
    assert " ".join("".join(str(int(known)) for known in group) for group in shown.mask) == mask
    assert " ".join("".join(LETTERS[tag] for tag in group) or "0" for group in shown.latents) == latents
    assert [len(frames) for frames in shown.passes] == passes
    assert len(shown.clip.kept) == kept


def test_figures_are_the_same_every_time_and_are_drawings() -> None:
    drawn = figures()
    assert list(drawn) == [*(f"{name}.svg" for name in conditioning.LAYOUTS), "chain.svg"]
    assert drawn == figures()
    for drawing in drawn.values():
        assert ElementTree.fromstring(drawing).tag == "{http://www.w3.org/2000/svg}svg"


def test_another_mask_in_the_engine_is_another_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    before = draw_layout("flf")
    monkeypatch.setitem(conditioning.LAYOUTS, "flf", replace(conditioning.LAYOUTS["flf"], end_mask="group"))
    assert draw_layout("flf") != before


def test_chain_shows_each_clips_seed_and_frames() -> None:
    chain = draw_layouts.draw_chain()
    for words in ("svi, seed + 0, 81 frames", "svi, seed + 42, 76 frames", "svi_latent, seed + 84, 76 frames"):
        assert words in chain
    assert chain.count("5 dropped") == 2


def test_page_shows_every_figure() -> None:
    shown = re.findall(r"^!\[\w+\]\(figures/(\w+\.svg)\)$", PAGE, flags=re.MULTILINE)
    assert sorted(shown) == sorted(figures())


def test_page_counts_frames_as_the_plan_does() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, flags=re.MULTILINE)
    assert [int(row[0]) for row in rows] == [5, 17, 77, 81]
    for row in rows:
        asked, plain, with_end, exact, window = map(int, row)
        clips = {
            (layout, policy): plan(Wish(asked, ("",), 0, layout, policy))[0]
            for layout, policy in [("flf", "exact"), ("svi_latent", "exact"), ("svi_latent", "window")]
        }
        assert clips["flf", "exact"].latent_frames == plain
        assert clips["svi_latent", "exact"].latent_frames == with_end
        assert len(clips["svi_latent", "exact"].kept) == exact
        assert (clips["svi_latent", "window"].latent_frames, len(clips["svi_latent", "window"].kept)) == (plain, window)
