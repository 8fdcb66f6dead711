"""Prompts to UMT5 embeddings, computed once a prompt."""

import html
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import ftfy
import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from engine.passage import to_device, to_host
from engine.position_buckets import shared_buckets
from engine.remembered import Remembered

MAX_TOKENS = 512  # what Wan's transformers were trained with; WanImageToVideoPipeline's max_sequence_length


@dataclass(frozen=True)
class Embedding:
    """One prompt as the transformer reads it."""

    hidden: Tensor
    """(1, 512, dim) where the transformer is, of the encoder's dtype; zero after the last real token."""
    tokens: int
    """Of the whole prompt, the end token included."""

    @property
    def unread_tokens(self) -> int:
        """How many tokens at the end of the prompt are beyond what the model reads."""
        return max(0, self.tokens - MAX_TOKENS)


class PromptEncoder:
    """Tokenizer, text encoder, and what they made remembered.

    `use_encoder` brings the encoder to where it computes for the length of a block; a remembered prompt never
    calls it. The key is the whole cleaned prompt: two prompts share an entry only if they reach it as one. What is
    remembered stays on the host. `device`: where embeddings are wanted; nobody waits for the encoder's work there.
    """

    def __init__(
        self, tokenizer: Any, use_encoder: Callable[[], AbstractContextManager[Any]], device: torch.device
    ) -> None:
        self._tokenizer = tokenizer
        self._use_encoder = use_encoder
        self._device = device
        self._remembered: Remembered[str, tuple[Tensor, int]] = Remembered()

    def encode(self, prompt: str) -> Embedding:
        """Embed one prompt as diffusers' WanImageToVideoPipeline does, to the last bit."""
        text = clean(prompt)
        real, tokens = self._remembered.get(text, lambda: self._compute(text))
        hidden = real.new_zeros((1, MAX_TOKENS, real.shape[1]), device=self._device)
        hidden[0, : len(real)].copy_(real, non_blocking=True)
        return Embedding(hidden, tokens)

    def _compute(self, text: str) -> tuple[Tensor, int]:
        """The real tokens' embeddings (n <= 512, dim), see passage.to_host, and how many tokens the whole text has."""
        tokens = self._tokenizer(
            text, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        read = int(tokens.attention_mask.sum())
        with self._use_encoder() as encoder, shared_buckets(encoder):
            mask = _mask(encoder, tokens.attention_mask)
            hidden = encoder(
                to_device(tokens.input_ids, encoder.device),
                None if mask is None else to_device(mask, encoder.device),
            ).last_hidden_state  # (1, 512, dim)
            real = to_host(hidden[0, :read])
        whole = read if read < MAX_TOKENS else len(self._tokenizer(text, verbose=False).input_ids)
        return real, whole


def _mask(encoder: Any, real: Tensor) -> Tensor | None:
    """What the encoder makes of the tokenizer's mask (1, n) by itself: (1, 1, n, n), None if all tokens are real.

    There it asks whether they are, and on a card waits for the answer, and so for the pictures that are being encoded,
    before it launches anything. One with four axes it takes as it is.
    """
    described = real.new_empty((*real.shape, 0), dtype=encoder.get_input_embeddings().weight.dtype)
    return cast(Tensor | None, create_bidirectional_mask(encoder.config, described, attention_mask=real))


def clean(prompt: str) -> str:
    """Repair mojibake, resolve HTML entities (some arrive escaped twice), make all white space one blank."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt))).strip())
