from contextlib import contextmanager

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline

from engine.conditioning import Given, condition
from engine.denoise import PhaseRun, Prompts, denoise
from engine.scheduler import ReferenceEuler
from engine.vae import encode_norm
from schemas.errors import Cancelled
from tests.engine.svi_parts import noise, picture, tiny_transformer, tiny_vae

CONDITION = torch.zeros(1, 20, 2, 2, 2)
PROMPT = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(5))
NEGATIVE = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(6))


class Experts:
    """Both models at hand; remembers which was asked for, which was called and with what."""

    def __init__(self, high, low):
        self._models = {"high": high, "low": low}
        self.used, self.called, self.open = [], [], 0

    @contextmanager
    def use(self, expert, forwards, then):
        self.used.append((expert, forwards, then))
        self.open += 1

        def call(**inputs):
            self.called.append((expert, inputs["timestep"].tolist(), inputs["encoder_hidden_states"]))
            return self._models[expert](**inputs)

        call.dtype = self._models[expert].dtype
        try:
            yield call
        finally:
            self.open -= 1


class Constant:
    """A model whose velocity is known: the same everywhere, in its own dtype."""

    def __init__(self, velocity, dtype):
        self.velocity, self.dtype = velocity, dtype

    def __call__(self, **inputs):
        hidden = inputs["hidden_states"]
        assert hidden.dtype == self.dtype
        return (torch.full_like(hidden[:, :16], self.velocity),)


def run(experts, *, high=2, low=4, guidance=(1.0, 1.0), start=None, prompts=None, on_step=lambda *_: None):
    phases = (PhaseRun("high", high, guidance[0]), PhaseRun("low", low, guidance[1]))
    return denoise(
        noise(2) if start is None else start,
        CONDITION,
        prompts or Prompts(PROMPT, NEGATIVE),
        phases,
        ReferenceEuler(shift=5.0),
        experts,
        on_step,
    )


def constants(high=1.0, low=1.0, dtype=torch.bfloat16):
    return Experts(Constant(high, dtype), Constant(low, dtype))


def test_row_12_experts_are_called_high_high_low_low_low_low():
    experts = constants()
    run(experts)

    assert [name for name, _, _ in experts.called] == ["high", "high", "low", "low", "low", "low"]
    assert [t[0] for _, t, _ in experts.called] == pytest.approx(
        [1000.0, 952.44, 882.53, 769.67, 556.79, 4.98], abs=0.01
    )


def test_each_expert_is_taken_once_and_given_back():
    experts = constants()
    run(experts)

    assert experts.used == [("high", 2, "low"), ("low", 4, "high")]
    assert experts.open == 0


def test_experts_hear_how_often_they_will_be_called_when_guided():
    experts = constants()
    run(experts, guidance=(3.0, 1.0))

    assert experts.used == [("high", 4, "low"), ("low", 4, "high")]


@pytest.mark.parametrize(
    ("guidance", "forwards", "calls"),
    [((1.0, 1.0), 6, "HHLLLL"), ((3.0, 1.0), 8, "HHHHLLLL"), ((1.0, 3.0), 10, "HHLLLLLLLL")],
)
def test_row_13_forwards_of_each_guidance(guidance, forwards, calls):
    experts = constants()
    run(experts, guidance=guidance)

    assert len(experts.called) == forwards
    assert "".join(name[0].upper() for name, _, _ in experts.called) == calls
    assert sum(PhaseRun("high", n, g).forwards for n, g in zip((2, 4), guidance, strict=True)) == forwards


def test_row_14_trajectory_against_the_closed_form_with_bf16_models():
    start, trajectory = noise(2), []
    run(constants(high=1.5, low=-0.75), start=start, on_step=lambda _done, latents: trajectory.append(latents))

    # x(sigma) moves by velocity times the change of sigma: 1.5 down to 0.88253, then -0.75 down to 0
    drift = [-0.0713436, -0.1762112, -0.0915724, 0.0680922, 0.4819481, 0.4856832]
    for latents, expected in zip(trajectory, drift, strict=True):
        assert latents.dtype == torch.float32
        torch.testing.assert_close(latents, start + expected, atol=1e-6, rtol=0)


def test_row_14_trajectory_against_a_hand_written_loop_with_bf16_models():
    high, low = tiny_transformer(1, torch.bfloat16), tiny_transformer(2, torch.bfloat16)
    sigmas = [1.0, 0.9524376, 0.8825259, 0.7696742, 0.5567879, 0.0049801, 0.0]
    expected = noise(2)
    for i, model in enumerate([high, high, low, low, low, low]):
        velocity = model(
            hidden_states=torch.cat([expected, CONDITION], dim=1).bfloat16(),
            timestep=torch.tensor([1000 * sigmas[i]]),
            encoder_hidden_states=PROMPT.bfloat16(),
            return_dict=False,
        )[0]
        expected = expected + (sigmas[i + 1] - sigmas[i]) * velocity.float()

    got = run(Experts(high, low))

    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_stock_scheduler_loses_the_latents_low_bits_so_ours_is_needed():
    stock = FlowMatchEulerDiscreteScheduler(shift=5.0)
    stock.set_timesteps(6, sigmas=[1.0, 0.8002, 0.6004, 0.4006, 0.2008, 0.001])
    latents = noise(2)
    for timestep in stock.timesteps:
        velocity = torch.full_like(latents, 0.75, dtype=torch.bfloat16)
        latents = stock.step(velocity, timestep, latents, return_dict=False)[0]

    exact = run(constants(high=0.75, low=0.75))
    assert (latents.float() - exact).abs().max() > 1e-3


def test_guidance_pushes_away_from_the_negative_prompt():
    class Reads:
        """A velocity that is the prompt's mean."""

        dtype = torch.float32

        def __call__(self, **inputs):
            mean = inputs["encoder_hidden_states"].mean()
            return (mean * torch.ones_like(inputs["hidden_states"][:, :16]),)

    prompts = Prompts(torch.full((1, 8, 16), 0.5), torch.full((1, 8, 16), 0.25))
    start = torch.zeros(1, 16, 2, 2, 2)

    got = run(Experts(Reads(), Reads()), guidance=(3.0, 1.0), start=start, prompts=prompts)

    # 0.25 + 3 * (0.5 - 0.25) = 1 over the first 0.1174741 of sigma, then 0.5 over the rest
    torch.testing.assert_close(got, torch.full_like(got, -0.1174741 - 0.4412630), atol=1e-6, rtol=0)


def test_unguided_run_needs_no_negative_prompt():
    experts = constants()
    run(experts, prompts=Prompts(PROMPT))

    assert len(experts.called) == 6


@pytest.mark.parametrize("guidance", [(3.0, 1.0), (1.0, 3.0)])
def test_guided_run_refuses_a_missing_negative_prompt_before_the_first_step(guidance):
    experts = constants()

    with pytest.raises(ValueError, match="negative"):
        run(experts, guidance=guidance, prompts=Prompts(PROMPT))

    assert experts.used == []


def test_on_step_sees_every_step_in_order():
    seen = []
    run(constants(), on_step=lambda done, latents: seen.append((done, tuple(latents.shape))))

    assert seen == [(n, (1, 16, 2, 2, 2)) for n in (1, 2, 3, 4, 5, 6)]


@pytest.mark.parametrize("stop_after", [1, 2, 3, 6])
def test_cancel_stops_within_one_step_and_gives_the_expert_back(stop_after):
    experts = constants()

    def cancel(done, _latents):
        if done == stop_after:
            raise Cancelled("the job was cancelled")

    with pytest.raises(Cancelled):
        run(experts, on_step=cancel)

    assert len(experts.called) == stop_after
    assert experts.open == 0


def test_row_23_twenty_two_latent_frames_run():
    experts = Experts(tiny_transformer(1), tiny_transformer(2))
    phases = (PhaseRun("high", 1, 1.0), PhaseRun("low", 1, 1.0))

    latents = denoise(
        noise(22), torch.zeros(1, 20, 22, 2, 2), Prompts(PROMPT), phases, ReferenceEuler(shift=5.0), experts,
        lambda *_: None,
    )  # fmt: skip

    assert latents.shape == (1, 16, 22, 2, 2)
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flf_equals_the_whole_stock_pipeline_with_last_image(dtype):
    vae, high, low = tiny_vae(), tiny_transformer(1, dtype), tiny_transformer(2, dtype)
    start, end = picture(1), picture(2)
    pipeline = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=high,
        transformer_2=low,
        scheduler=ReferenceEuler(shift=5.0),
        boundary_ratio=0.883,
    )
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        image=start,
        last_image=end,
        prompt_embeds=PROMPT,
        height=16,
        width=16,
        num_frames=17,
        num_inference_steps=6,
        guidance_scale=1.0,
        guidance_scale_2=1.0,
        latents=noise(5),
        output_type="latent",
    ).frames

    first, last = (pipeline.video_processor.preprocess(image, 16, 16).unsqueeze(2) for image in (start, end))
    y = condition("flf", 5, Given(first, first, last), lambda video: encode_norm(vae, video))
    ours = denoise(
        noise(5),
        y,
        Prompts(PROMPT),
        (PhaseRun("high", 2, 1.0), PhaseRun("low", 4, 1.0)),
        ReferenceEuler(shift=5.0),
        Experts(high, low),
        lambda *_: None,
    )

    assert torch.equal(ours, stock)
