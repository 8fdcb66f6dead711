"""What must go together in a `svi_endframe` request, and what its caller should be told."""

from typing import TYPE_CHECKING

from schemas.request import Rule
from schemas.words import either

if TYPE_CHECKING:
    from schemas.svi_schema import SviEndframeRequest

CLIP_FRAMES = 81
"""The longest clip: what the model was trained on. Beyond it colours fade and the first frame comes back."""

MAX_CLIPS = 16
"""Of one request; longer films go on by `state`."""

MAX_STEPS = 100
"""Of both experts together, however they are asked for."""

DEFAULT_LAYOUTS = {
    "wan_2_2_i2v_lightning_svi_3_3": "svi_latent",
    "wan_2_2_i2v_lightning_svi_endframe": "flf",
}
CHAINABLE = ("svi", "svi_latent", "svi_upstream")
"""Made in latent space: they begin on the anchor and take up the motion of the clip before."""
SEVERAL_STARTS = ("svi_pixel4", "flf", "kijai_end")
"""Made in pixel space: they begin on the start picture or pictures, and have no place for motion."""
END_FRAMES = {"svi_pixel4": 4, "flf": 1, "kijai_end": 0}
"""The same layouts: frames at the end of a clip that show the end picture and can be no start."""
END_ALONE = ("svi_latent", "kijai_end")
"""The end is a latent of its own and decoded alone, so the last frame can be locked to it."""
WINDOWED = ("svi_latent", "kijai_end", "svi_pixel4")
"""Their first implementations do not return the frames that were asked for."""

_LAYOUT = ("layout", "svi2pro", "model_type")
_LENGTH = ("video_length", "segments", "overlap")


def _begins_somewhere(request: "SviEndframeRequest") -> str | None:
    if request.image_start is None and request.image_refs is None and request.prefix_video is None:
        return "is missing; give the start picture, image_refs or prefix_video"
    return None


def _ends_as_the_layout_does(request: "SviEndframeRequest") -> str | None:
    layout = request.chosen_layout
    if layout == "svi" and request.image_end is not None:
        return "has no place in layout svi, which has no end; leave one of the two out"
    if layout != "svi" and request.image_end is None:
        return f"is missing; layout {layout} ends on it (layout svi ends where it will)"
    return None


def _one_kind_of_layout(request: "SviEndframeRequest") -> str | None:
    if request.layout is None or request.svi2pro in (None, request.layout.startswith("svi")):
        return None
    kind = "none of SVI's layouts" if request.svi2pro else "one of SVI's layouts"
    return f"{request.layout} is {kind}, and svi2pro is {str(request.svi2pro).lower()}; leave one of the two out"


def _several_starts_have_a_place(request: "SviEndframeRequest") -> str | None:
    count = len(request.image_start) if isinstance(request.image_start, tuple) else 1
    if count == 1 or request.chosen_layout in SEVERAL_STARTS:
        return None
    return (
        f"must be one picture in layout {request.chosen_layout}, got {count}; layouts for several: "
        f"{', '.join(SEVERAL_STARTS)}; or give prefix_video"
    )


def _starts_leave_room_for_the_end(request: "SviEndframeRequest") -> str | None:
    layout, count = request.chosen_layout, len(request.image_start) if isinstance(request.image_start, tuple) else 1
    if layout not in END_FRAMES or request.prefix_video is not None:
        return None
    most = request.total_frames - END_FRAMES[layout]
    if count <= most:
        return None
    return f"must be at most {most} of the {request.total_frames} frames in layout {layout}, got {count} pictures"


def _one_past(request: "SviEndframeRequest") -> str | None:
    if request.state is not None and request.prefix_video is not None:
        return "and prefix_video both say what the video goes on from; leave one of the two out"
    return None


def _layout_takes_motion(request: "SviEndframeRequest") -> str | None:
    if request.chosen_layout in CHAINABLE:
        return None
    if request.state is not None or request.return_state or request.clip_count > 1:
        return (
            f"{request.chosen_layout} makes one clip of at most {CLIP_FRAMES} frames, and neither takes nor "
            f"returns a state; for more: {', '.join(CHAINABLE)}"
        )
    return None


def _not_too_many_clips(request: "SviEndframeRequest") -> str | None:
    most = CLIP_FRAMES + (CLIP_FRAMES - 1 - request.overlap) * (MAX_CLIPS - 1)
    if request.total_frames <= most:
        return None
    return (
        f"must be at most {most} with overlap {request.overlap}, got {request.total_frames}: "
        f"a video has at most {MAX_CLIPS} clips"
    )


def _segments_divide_the_length(request: "SviEndframeRequest") -> str | None:
    fewest, most = request.possible_clips
    if request.segments is None or fewest <= request.segments <= most:
        return None
    return (
        f"must be {fewest} to {most} for {request.total_frames} frames, got {request.segments}; "
        f"a clip has at most {CLIP_FRAMES}"
    )


def _something_new_after_the_past(request: "SviEndframeRequest") -> str | None:
    shared = 1 + request.overlap
    if (request.state is None and request.prefix_video is None) or request.total_frames >= shared + 4:
        return None
    return f"must be at least {shared + 4}, got {request.total_frames}: {shared} frames repeat what was before"


def _one_kind_of_prompt(request: "SviEndframeRequest") -> str | None:
    if len(request.given("prompt", "prompts")) == 2:
        return "and prompt are both given; keep one"
    return None


def _a_clip_for_each_prompt(request: "SviEndframeRequest") -> str | None:
    count = len(request.prompts or ())
    if count <= request.clip_count:
        return None
    sentence = f"must be at most one for each of {request.clip_count} clips, got {count}"
    if request.chosen_layout not in CHAINABLE:
        return f"{sentence}: layout {request.chosen_layout} makes one clip"
    most = request.possible_clips[1]
    if request.given("video_length") and count > most:
        return f"{sentence}; {request.total_frames} frames make at most {most}"
    return f"{sentence}; set segments to {count}"


def _both_experts_counted(request: "SviEndframeRequest") -> str | None:
    if len(request.given("high_steps", "low_steps")) == 1:
        return "and low_steps go together; give both or neither"
    total = request.counted_steps
    if total is not None and total > MAX_STEPS:
        return f"and low_steps must be at most {MAX_STEPS} together, got {request.high_steps} + {request.low_steps}"
    return None


def _steps_add_up(request: "SviEndframeRequest") -> str | None:
    total = request.counted_steps
    if total is None or request.num_inference_steps in (None, total):
        return None
    return (
        f"must be {request.high_steps} + {request.low_steps} = {total} as high_steps and low_steps say, "
        f"got {request.num_inference_steps}"
    )


def _one_kind_of_split(request: "SviEndframeRequest") -> str | None:
    if request.switch_threshold is not None and request.given("high_steps", "low_steps"):
        return "and high_steps with low_steps both say where the experts change; leave one of the two out"
    return None


def _lock_has_an_end(request: "SviEndframeRequest") -> str | None:
    if request.lock_end and request.chosen_layout not in END_ALONE:
        return f"must be left out: layout {request.chosen_layout} does not decode its end alone"
    return None


RULES = (
    Rule(("image_start", "image_refs", "prefix_video"), _begins_somewhere),
    Rule(("image_end", *_LAYOUT), _ends_as_the_layout_does),
    Rule(_LAYOUT, _one_kind_of_layout),
    Rule(("image_start", *_LAYOUT), _several_starts_have_a_place),
    Rule(("image_start", *_LAYOUT, *_LENGTH, "prefix_video"), _starts_leave_room_for_the_end),
    Rule(("state", "prefix_video"), _one_past),
    Rule((*_LAYOUT, *_LENGTH, "state", "return_state"), _layout_takes_motion),
    Rule(_LENGTH, _not_too_many_clips),
    Rule(("segments", "video_length", "overlap"), _segments_divide_the_length),
    Rule((*_LENGTH, "state", "prefix_video"), _something_new_after_the_past),
    Rule(("prompts", "prompt"), _one_kind_of_prompt),
    Rule(("prompts", *_LENGTH, *_LAYOUT), _a_clip_for_each_prompt),
    Rule(("high_steps", "low_steps"), _both_experts_counted),
    Rule(("num_inference_steps", "high_steps", "low_steps"), _steps_add_up),
    Rule(("switch_threshold", "high_steps", "low_steps"), _one_kind_of_split),
    Rule(("lock_end", *_LAYOUT), _lock_has_an_end),
)
"""In the order in which the errors are read."""


def svi_warnings(request: "SviEndframeRequest") -> list[str]:
    """What is legal and may surprise."""
    layout = request.chosen_layout
    notes = _start_and_anchor(request)
    if request.video_prompt_type is not None:
        notes.append("video_prompt_type has no effect: image_refs always counts")
    if not request.prompt and request.prompts is None:
        notes.append("prompt is empty: only the pictures lead the video")
    if request.empty_frames == "anchor":
        notes.append("empty_frames anchor is known to repeat the first frame; SVI Pro was trained on zeros")
    if request.frame_policy == "window" and layout not in WINDOWED:
        notes.append(f"frame_policy has no effect: layout {layout} always returns what was asked for")
    if request.clip_count == 1 and not _is_linked(request):
        notes += [f"{name} has no effect on a single clip" for name in request.changed("overlap")]
    if request.negative_prompt is not None and _unguided(request):
        notes.append("negative_prompt has no effect where both guidance scales are 1 or less")
    return notes


def _is_linked(request: "SviEndframeRequest") -> bool:
    """Whether it goes on from something, or something may go on from it."""
    return request.return_state or request.state is not None or request.prefix_video is not None


def _start_and_anchor(request: "SviEndframeRequest") -> list[str]:
    unused = request.given("image_start", "image_refs")
    if request.chosen_layout in SEVERAL_STARTS and request.prefix_video is not None and unused:
        start_on = f"layout {request.chosen_layout} starts on the newest frames of prefix_video"
        return [f"{start_on}, not on {either(unused)}"]
    start = request.image_start[0] if isinstance(request.image_start, tuple) else request.image_start
    if start is None or request.image_refs is None or start == request.image_refs[0]:
        return []
    if request.chosen_layout in CHAINABLE:
        return [f"layout {request.chosen_layout} starts on the anchor in image_refs, not on image_start"]
    return [f"layout {request.chosen_layout} starts on image_start, not on the anchor in image_refs"]


def _unguided(request: "SviEndframeRequest") -> bool:
    """Whether guidance is known to be off in both phases. What the request leaves open is not known here."""
    scales = (request.guidance_scale, request.guidance2_scale)
    return all(scale is not None and scale <= 1 for scale in scales)
