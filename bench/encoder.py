"""The text encoder in 8 bits: seconds, memory and accuracy beside bf16. Full width, random weights.

python -m bench.encoder                                       on the card: all 24 layers, 512 tokens
python -m bench.encoder --layers 2 --tokens 64 --words 512    on a CPU: as wide, and not as deep

The forms that the worker uses round weights alone. `fp8` and `int8`, which round the activations too, are here to
show why: with a few channels a hundred times larger, as T5's are, one scale a token leaves the others no bits.
Neither set of weights says what the real ones do.
"""

import argparse
import copy
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn

from bench.jobs import GIB
from engine import umt5_passes
from engine.eight_bits import KEEP_UMT5
from engine.linear8 import KINDS, replace_linears
from engine.linear8_check import snr_db
from engine.parts import library_class
from engine.profiles import PROFILES
from engine.published import published_values

COMPONENT = PROFILES["wan22_i2v_svi"].component("text_encoder")
LOUD_CHANNELS, LOUDNESS = 8, 100.0  # of every norm's factors


@dataclass(frozen=True)
class Figures:
    """`weights_gib`: of the whole encoder; `work_gib`: the peak above them (0 on a CPU); `snr_db`: against bf16."""

    weights: str
    form: str
    seconds: float
    weights_gib: float
    work_gib: float
    snr_db: float


def random_encoder(layers: int, words: int, device: str) -> nn.Module:
    """A text encoder of the published width, bf16, by the library's own initialisation; `words`: of its table."""
    cls = library_class(COMPONENT)
    config = cls.config_class.from_dict({**published_values(COMPONENT), "num_layers": layers, "vocab_size": words})
    torch.manual_seed(0)
    with torch.device(device):
        encoder: nn.Module = cls(config).to(torch.bfloat16).requires_grad_(False).eval()
    return encoder


def make_loud(encoder: nn.Module) -> None:
    """Make a few channels of what every layer reads a hundred times larger than the others."""
    for name, parameter in encoder.named_parameters():
        if name.endswith("layer_norm.weight"):
            parameter.data[:: parameter.numel() // LOUD_CHANNELS] *= LOUDNESS


@torch.inference_mode()
def measure(layers: int, words: int, tokens: int, device: str) -> list[Figures]:
    """Every form on ordinary weights, then on loud ones. The encoder is held twice while one form is measured."""
    encoder = random_encoder(layers, words, device)
    ids = torch.randint(words, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    results = []
    for weights in ("random", "loud channels"):
        if weights == "loud channels":
            make_loud(encoder)
        reference = encoder(ids, mask).last_hidden_state
        for form in ("bf16", *KINDS):
            model = encoder if form == "bf16" else copy.deepcopy(encoder)
            if form != "bf16":
                replace_linears(model, form, KEEP_UMT5)
                umt5_passes.install(model)
            results.append(_figures(weights, form, model, (ids, mask), reference))
    return results


def _figures(
    weights: str, form: str, model: nn.Module, given: tuple[torch.Tensor, ...], reference: torch.Tensor
) -> Figures:
    on_card = reference.device.type == "cuda"
    held = torch.cuda.memory_allocated() if on_card else 0
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    hidden = model(*given).last_hidden_state
    work = torch.cuda.max_memory_allocated() - held if on_card else 0
    times = []
    for _ in range(5 if on_card else 2):
        began = time.perf_counter()
        model(*given)
        if on_card:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return Figures(weights, form, min(times), size / GIB, work / GIB, snr_db(reference, hidden))


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="bench.encoder", description="The text encoder in 8 bits, beside bf16.")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--words", type=int, default=256_384, help="of the table: its published size is 2.1 GB")
    args = parser.parse_args()
    print(f"{'weights':14} {'form':13} {'s':>8} {'weights GiB':>12} {'work GiB':>9} {'SNR dB':>7}")
    for row in measure(args.layers, args.words, args.tokens, device):
        figures = f"{row.seconds:8.4f} {row.weights_gib:12.2f} {row.work_gib:9.2f} {row.snr_db:7.1f}"
        print(f"{row.weights:14} {row.form:13} {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
