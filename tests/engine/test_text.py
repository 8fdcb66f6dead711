from contextlib import contextmanager

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import prompt_clean

from engine.scheduler import ReferenceEuler, reference_timesteps
from engine.text import PromptEncoder, clean
from tests.engine.operators import Operators
from tests.engine.svi_parts import tiny_text_encoder, tiny_tokenizer
from tests.engine.waiting import never_waiting

FOX = "a red fox runs"


def prompt_encoder():
    """A PromptEncoder on tiny parts, and the list of the prompts' ids that its encoder was called with."""
    model, calls = tiny_text_encoder(), []
    model.register_forward_pre_hook(lambda _module, inputs: calls.append(inputs[0].tolist()))

    @contextmanager
    def use_encoder():
        yield model

    return PromptEncoder(tiny_tokenizer(), use_encoder, torch.device("cpu")), calls


def stock(prompt):
    pipeline = WanImageToVideoPipeline(
        tokenizer=tiny_tokenizer(), text_encoder=tiny_text_encoder(), vae=None, scheduler=None
    )
    return pipeline.encode_prompt(prompt, None, False, max_sequence_length=512, device=torch.device("cpu"))[0]


@pytest.mark.parametrize("prompt", [FOX, "", "unknown words only", "fox " * 600])
def test_encode_equals_the_stock_pipeline(prompt):
    encoder, _ = prompt_encoder()

    assert torch.equal(encoder.encode(prompt).hidden, stock(prompt))


def test_encode_remembers_a_prompt_and_gives_the_same_bits():
    encoder, calls = prompt_encoder()
    first, again = encoder.encode(FOX), encoder.encode(FOX)

    assert len(calls) == 1
    assert torch.equal(first.hidden, again.hidden)


def test_encode_tells_prompts_apart_that_differ_by_case_or_one_letter():
    encoder, calls = prompt_encoder()
    for prompt in (FOX, "a red fox run", "a Red fox runs", "a red fox runs."):
        encoder.encode(prompt)

    assert len(calls) == 4


def test_changing_a_result_does_not_change_what_is_remembered():
    encoder, _ = prompt_encoder()
    expected = encoder.encode(FOX).hidden.clone()
    encoder.encode(FOX).hidden.zero_()

    assert torch.equal(encoder.encode(FOX).hidden, expected)


@pytest.mark.parametrize("prompt", [FOX, "fox " * 600])
def test_encoder_is_launched_without_a_question(prompt, monkeypatch):
    encoder, _ = prompt_encoder()
    with encoder._use_encoder() as model:
        forward, operators = model.forward, Operators()

    def watched(*args):
        with operators:
            return forward(*args)

    monkeypatch.setattr(model, "forward", watched)
    encoder.encode(prompt)
    assert operators.questions == 0
    watched(torch.zeros(1, 512, dtype=torch.long), torch.ones(1, 512, dtype=torch.long))
    assert operators.questions == 1  # a mask of two axes is asked about


def test_embedding_is_made_where_it_is_wanted_and_remembered_on_the_host():
    encoder, _ = prompt_encoder()
    encoder._device = torch.device("meta")
    assert encoder.encode(FOX).hidden.device.type == "meta"
    (remembered,) = encoder._remembered._values.values()
    assert (remembered[0].device.type, len(remembered[0])) == ("cpu", 5)


@pytest.mark.gpu
def test_words_reach_the_transformer_without_the_host_waiting_for_the_card():
    on_card, wanted = tiny_text_encoder().to("cuda"), stock(FOX)

    @contextmanager
    def use_encoder():
        yield on_card

    encoder = PromptEncoder(tiny_tokenizer(), use_encoder, torch.device("cuda"))
    encoder.encode("warm")  # what is made once
    busy = torch.ones(4096, 4096, device="cuda")  # not drawn: a graph whose capture failed leaves that unusable
    with torch.inference_mode(), never_waiting():
        for _ in range(50):
            busy = busy @ busy
        made, known = encoder.encode(FOX), encoder.encode(FOX)
        scheduler = ReferenceEuler(shift=3.0)
        scheduler.set_timesteps(6, "cuda")
    assert torch.equal(made.hidden, known.hidden)
    assert (made.hidden.cpu() - wanted).abs().max() < 1e-4
    assert scheduler.timesteps.tolist() == pytest.approx(reference_timesteps(6, 3.0))


def test_embedding_is_zero_after_the_last_real_token():
    embedding = prompt_encoder()[0].encode(FOX)

    assert embedding.hidden.shape == (1, 512, 16)
    assert embedding.tokens == 5
    assert embedding.hidden[:, 5:].abs().max() == 0.0
    assert embedding.hidden[:, 4].abs().max() > 0.0


@pytest.mark.parametrize(("words", "unread"), [(4, 0), (511, 0), (512, 1), (600, 89)])
def test_embedding_counts_the_tokens_that_nobody_reads(words, unread):
    assert prompt_encoder()[0].encode("fox " * words).unread_tokens == unread


@pytest.mark.parametrize("prompt", ["  a  red\n fox ", "fox &amp;amp; snow", "cafÃ© fox", "fox &lt;b&gt;"])
def test_clean_equals_the_stock_cleaning(prompt):
    assert clean(prompt) == prompt_clean(prompt)


def test_clean_repairs_what_it_should():
    assert clean("  cafÃ© &amp;amp;\n\t fox ") == "café & fox"
