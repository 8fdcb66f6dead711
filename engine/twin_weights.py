"""Hand-set weights for the Wan twins, so that what goes in can be seen in what comes out.

The VAE twin carries colours: decode(encode(video)) is the video at an eighth of its size. The transformer twin looks,
at each place, for the given frames, and moves the noise towards them: a start picture stays, and between a start and
an end picture lies a cross-fade. All else keeps random values, scaled down: a reason for every tensor to matter.
"""

from typing import Any

import torch
from torch import Tensor

NOISE = 0.05  # of the library's own initialisation: what stays random

# The VAE's carried channels: three colours, lifted so that SiLU is nearly the identity, and a constant so large that
# the norms divide every place by the same.
COLOURS, CARRIED = 3, 4
LIFT, LEVEL = 2.0, 64.0
GAIN = 6.0  # of a lifted colour at the last SiLU

# The latent: each colour in five of the 16 channels, with both signs, so that noise averages out.
COPIES = 15
CONTRAST = 1.5  # of a normalised latent, for a colour of 1

# The transformer's hidden channels: the 64 noisy numbers of a patch, the 12 given colours, the mask, the 12 wanted
# colours, and a constant with both signs, which the layer norms divide by.
WIDTH, HEAD = 96, 48
GIVEN, MASK, WANTED, PLUS, MINUS = 64, 76, 77, 94, 95
CONSTANT = 100.0
SPREAD = CONSTANT * (2 / WIDTH) ** 0.5  # standard deviation of the hidden channels
STEER = 3.0  # how fast noise falls: on a fine schedule exp(-3) of it is left
SHARPNESS = 2.1  # of queries and keys: the right place outweighs its neighbour forty times


def carry_colours(vae: Any) -> None:
    """Make an AutoencoderKLWan with base_dim >= 4 and z_dim 16 a codec of colours."""
    z_dim = vae.config.z_dim
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    write = CONTRAST * std[:, None] * _copies()
    read = _copies().T / std / CONTRAST / (COPIES // COLOURS)
    _quieten(vae)
    for module in vae.modules():
        _pass_on(module)
    _enter(vae.encoder.conv_in, torch.eye(COLOURS), torch.zeros(COLOURS))
    _leave(vae.encoder, torch.cat([write, torch.zeros(z_dim, COLOURS)]), torch.cat([mean, torch.zeros(z_dim)]))
    _set(vae.quant_conv, torch.eye(2 * z_dim))
    _set(vae.post_quant_conv, torch.eye(z_dim))
    _enter(vae.decoder.conv_in, read, -read @ mean)
    _leave(vae.decoder, torch.eye(COLOURS), torch.zeros(COLOURS))


def follow_pictures(transformer: Any) -> None:
    """Make a WanTransformer3DModel with two heads of 48 paint the given frames over time."""
    _quieten(transformer)
    given = _copies() / COPIES * COLOURS  # (16 latent channels, 3 colours)
    patch = torch.zeros(WIDTH, 36, 1, 2, 2)  # noisy 0..15, mask 16..19, given 20..35
    wanted = torch.zeros(4, 16, WIDTH)
    for place in range(4):
        h, w = divmod(place, 2)
        for channel in range(16):
            patch[channel * 4 + place, channel, 0, h, w] = 1.0
            wanted[place, channel, channel * 4 + place] = STEER * SPREAD
            for colour in range(COLOURS):
                patch[GIVEN + colour * 4 + place, 20 + channel, 0, h, w] = given[channel, colour]
                wanted[place, channel, WANTED + colour * 4 + place] = -STEER * SPREAD * _copies()[channel, colour]
    patch[MASK, 19] = 1 / 4  # the last of four sub-frames: named for a picture at the start, and at the end
    transformer.patch_embedding.weight.data.copy_(patch)
    transformer.patch_embedding.bias.data.zero_()
    transformer.patch_embedding.bias.data[[PLUS, MINUS]] = torch.tensor([CONSTANT, -CONSTANT])
    transformer.proj_out.weight.data.copy_(wanted.reshape(64, WIDTH))
    transformer.blocks[0].scale_shift_table.data[:, 2] = 1.0  # the gate of its self-attention
    _look_up(transformer.blocks[0].attn1)


def _look_up(attention: Any) -> None:
    """Self-attention that fetches the given colours of its own place from the frames that the mask names.

    In head 0 a query is a constant, a key is the mask; rotation makes their product fall with the distance. Three
    frequencies of height and width find the place. Slow time prefers the nearer frame, which fades one into the
    other; fast time, only between given frames, makes a given frame prefer itself. A key without a mask points into
    head 1, where no query does.
    """
    unit = SPREAD / CONSTANT  # a weight of this turns the constant channel, after the norm, into 1
    query, key = torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH, WIDTH)
    rows, columns = range(16, 22, 2), range(32, 38, 2)  # of 8 pairs each: after 8 pairs of time
    for pair in (*rows, *columns):
        query[pair, PLUS], key[pair, MASK] = unit, SPREAD
    query[4, PLUS], key[4, MASK] = 0.8 * unit, 0.8 * SPREAD  # time at 0.1 radians a frame
    for pair in (0, 2):  # time at 1 and 0.3 radians a frame
        query[pair, MASK], key[pair, MASK] = 1.4 * SPREAD, 1.4 * SPREAD
    key[HEAD, PLUS] = 0.6 * unit
    value, out = torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH, WIDTH)
    for i in range(12):
        value[i, GIVEN + i], out[WANTED + i, i] = SPREAD, 1.0
    for linear, matrix in zip((attention.to_q, attention.to_k, attention.to_v), (query, key, value), strict=True):
        linear.weight.data.add_(matrix)
    attention.to_out[0].weight.data.add_(out)
    for norm in (attention.norm_q, attention.norm_k):
        norm.weight.data.fill_(SHARPNESS)


def _copies() -> Tensor:
    """(16, 3): which latent channel holds which colour, with which sign."""
    copies = torch.zeros(16, COLOURS)
    for i in range(COPIES):
        copies[i, i % COLOURS] = 1.0 if i % 2 else -1.0
    return copies


def _quieten(model: Any) -> None:
    """Scale random values down. Norms stay, but for zeros: a tensor of zeros would not be missed by any test."""
    for name, parameter in model.named_parameters():
        if not parameter.any():
            parameter.data.normal_(0.0, NOISE)
        elif not name.endswith("gamma") and ".norm" not in name:
            parameter.data.mul_(NOISE)


def _pass_on(module: Any) -> None:
    """Let the carried channels through a resampling or a shortcut, untouched but for the size."""
    kind = type(module).__name__
    keep = torch.eye(CARRIED)
    if kind == "WanResample" and module.mode.startswith("down"):
        corner = torch.zeros(3, 3)
        corner[:2, :2] = 1 / 4
        _set_spatial(module.resample[1], keep, corner)
    elif kind == "WanResample":
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        _set_spatial(module.resample[1], keep, line[:, None] * line)
    if kind == "WanResample" and module.mode == "downsample3d":
        _set(module.time_conv, keep)
    elif kind == "WanResample" and module.mode == "upsample3d":
        _set(module.time_conv, keep)
        _set(module.time_conv, keep, first=module.dim)  # the second of the two frames that it makes
    if kind == "WanResidualBlock" and hasattr(module.conv_shortcut, "weight"):
        _set(module.conv_shortcut, keep)


def _enter(conv: Any, matrix: Tensor, offset: Tensor) -> None:
    """Read colours by `matrix`, lift them, and add the constant."""
    _set(conv, torch.cat([matrix, torch.zeros(1, matrix.shape[1])]), torch.cat([offset + LIFT, torch.tensor([LEVEL])]))


def _leave(coder: Any, matrix: Tensor, offset: Tensor) -> None:
    """Write colours by `matrix` (out, 3), undoing the lift and what the last norm does."""
    width = coder.norm_out.gamma.shape[0]
    coder.norm_out.gamma.data[:COLOURS] = GAIN * LEVEL / width**0.5
    _set(coder.conv_out, matrix / GAIN, offset - LIFT * matrix.sum(1))


def _set(conv: Any, matrix: Tensor, bias: Tensor | None = None, first: int = 0) -> None:
    """Give output rows from `first` on this matrix, at the middle of the kernel and the present frame only."""
    rows, columns = slice(first, first + matrix.shape[0]), slice(0, matrix.shape[1])
    weight = conv.weight.data
    weight[rows] = 0
    weight[rows, columns, -1, weight.shape[3] // 2, weight.shape[4] // 2] = matrix
    if bias is not None:
        conv.bias.data[rows] = bias


def _set_spatial(conv: Any, matrix: Tensor, kernel: Tensor) -> None:
    rows, columns = matrix.shape
    conv.weight.data[:rows] = 0
    conv.weight.data[:rows, :columns] = matrix[:, :, None, None] * kernel
