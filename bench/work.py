"""How much arithmetic the models must do: the numerator of every TFLOP/s that is reported.

Formulas for the transformer, counts for the VAE, both checked against torch.utils.flop_counter by a test.
1 multiply-add is 2 operations.
"""

from dataclasses import dataclass

TEXT_TOKENS = 512  # UMT5, padded
IMAGE_TOKENS = 257  # CLIP ViT-H of Wan2.1
TERA = 1e12
ROUNDING = frozenset({"attention8", "sage"})  # attention kernels that are no ceiling of the exact ones

# AutoencoderKLWan at 832x480x81 (z 16, base 96), counted; proportional to the area.
VAE_ENCODE = 163.7 * TERA
VAE_ENCODE_MEMOISED = 60.0 * TERA  # start and end picture
VAE_DECODE = 275.4 * TERA


@dataclass(frozen=True)
class Forward:
    """Operations of one transformer forward, by what does them."""

    linear: float
    self_attention: float
    cross_attention: float

    @property
    def attention(self) -> float:
        return self.self_attention + self.cross_attention

    @property
    def total(self) -> float:
        return self.linear + self.attention

    def floor_s(self, linear_rate: float, attention_rate: float) -> float:
        """Seconds at the given rates in operations a second, nothing else taking time."""
        return self.linear / linear_rate + self.attention / attention_rate


def forward_work(
    tokens: int,
    *,
    image_tokens: int = 0,
    width: int = 5120,
    feed_forward: int = 13_824,
    layers: int = 40,
    in_channels: int = 36,
    out_channels: int = 16,
) -> Forward:
    """One forward of a Wan transformer; the defaults are the 14B model's. `image_tokens`: 257 for Wan2.1."""
    context = TEXT_TOKENS + image_tokens
    block = 6 * tokens * width**2  # query, key, value and output of self-attention, query and output of cross-attention
    block += 2 * context * width**2 + 2 * tokens * width * feed_forward
    ends = tokens * width * 4 * (in_channels + out_channels)  # patches of 1 x 2 x 2
    text = TEXT_TOKENS * width * (4096 + width)
    time = width * (256 + width + 6 * width)
    image = image_tokens * (1280 * 1280 + 1280 * width)
    return Forward(
        linear=2.0 * (layers * block + ends + text + time + image),
        self_attention=4.0 * layers * tokens**2 * width,
        cross_attention=4.0 * layers * tokens * context * width,
    )
