"""The clips that a `svi_endframe` request is made in."""

from engine.chain import Clip, Wish, check_hand_over, plan
from schemas.svi_schema import SviEndframeRequest


def clips_for(request: SviEndframeRequest, seed: int = 0, first_index: int = 0) -> tuple[Clip, ...]:
    """The request's clips. `seed`: of clip 0 of the whole film. `first_index`: of this request's first clip in it.

    Raises:
        InvalidInput: as `engine.chain.plan`; or nothing can go on from the last one, and `return_state` asks for that.
    """
    wish = Wish(
        frames=request.total_frames,
        prompts=request.clip_prompts,
        seed=seed,
        layout=request.chosen_layout,
        policy=request.frame_policy,
        segments=request.segments,
        overlap=request.overlap,
        continues=request.state is not None or request.prefix_video is not None,
        first_index=first_index,
    )
    clips = plan(wish)
    if request.return_state:
        check_hand_over(clips[-1], request.overlap)
    return clips
