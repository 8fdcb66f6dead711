import pytest
import torch
from diffusers import AutoencoderKLWan

from engine import vae as vae_module
from engine.vae import decode_chunks, decode_end_single, denormalise, encode_norm, normalise
from tests.engine.svi_parts import noise, pixels, tiny_vae


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


def first_frame_chunks_encode(vae, video):
    """A straight-line encoder: frame 0, then fours with the running features, the last frame with none."""
    features = [None] * vae._cached_conv_counts["encoder"]
    parts = [vae.encoder(video[:, :, :1], feat_cache=features, feat_idx=[0])]
    for first in range(1, video.shape[2] - 1, 4):
        parts.append(vae.encoder(video[:, :, first : first + 4], feat_cache=features, feat_idx=[0]))
    fresh = [None] * len(features)
    parts.append(vae.encoder(video[:, :, -1:], feat_cache=fresh, feat_idx=[0]))
    return normalise(vae, by_parts(vae.quant_conv, torch.cat(parts, dim=2))[:, :16])


def first_frame_chunks_decode(vae, latents):
    """The decoder's mirror image: the last latent with fresh features."""
    hidden = by_parts(vae.post_quant_conv, denormalise(vae, latents))
    features = [None] * vae._cached_conv_counts["decoder"]
    parts = []
    for i in range(hidden.shape[2]):
        if i == hidden.shape[2] - 1:
            features = [None] * len(features)
        alone = i in (0, hidden.shape[2] - 1)
        parts.append(vae.decoder(hidden[:, :, i : i + 1], feat_cache=features, feat_idx=[0], first_chunk=alone))
    return torch.cat(parts, dim=2).clamp(-1, 1)


def by_parts(pointwise, frames):
    """All but the last, then the last: how many frames it is given decides on some processors how it adds."""
    return torch.cat([pointwise(frames[:, :, :-1]), pointwise(frames[:, :, -1:])], dim=2)


def test_encode_norm_gives_the_stock_posterior_mode_normalised(vae):
    video = pixels(9)
    raw = vae.encode(video).latent_dist.mode()
    mean = torch.tensor(vae.config.latents_mean).view(1, 16, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)

    latents = encode_norm(vae, video)

    assert latents.shape == (1, 16, 3, 2, 2)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, (raw - mean) / std, atol=1e-6, rtol=0)  # 1 / std rounds once more


def test_encode_norm_is_fp32_with_a_bf16_vae():
    latents = encode_norm(tiny_vae().to(torch.bfloat16), pixels(5))

    assert latents.dtype == torch.float32


@pytest.mark.parametrize("frames", [2, 3, 4, 6, 16, 18, 80, 82])
def test_row_08_encode_refuses_frames_that_the_vae_would_drop(frames):
    vae = tiny_vae()
    encoded = []
    vae.encoder.register_forward_pre_hook(lambda _module, inputs: encoded.append(inputs))

    with pytest.raises(ValueError, match=f"^{frames} frames: must be 4k \\+ 1"):
        encode_norm(vae, pixels(frames))

    assert encoded == []


def test_stock_encode_ignores_the_last_frame_of_18_so_the_refusal_is_needed(vae):
    video = pixels(18)
    changed = video.clone()
    changed[:, :, -1] = 1.0

    assert torch.equal(vae.encode(video).latent_dist.mode(), vae.encode(changed).latent_dist.mode())


def test_denormalise_undoes_normalise(vae):
    raw = noise(3)

    torch.testing.assert_close(denormalise(vae, normalise(vae, raw)), raw, atol=1e-6, rtol=0)  # two roundings


@pytest.mark.parametrize(("latent_frames", "sizes"), [(1, [1]), (2, [1, 4]), (5, [1, 4, 4, 4, 4])])
def test_decode_chunks_equals_stock_decode(vae, latent_frames, sizes):
    latents = noise(latent_frames)

    chunks = list(decode_chunks(vae, latents))

    assert [chunk.shape[2] for chunk in chunks] == sizes
    assert torch.equal(torch.cat(chunks, dim=2), vae.decode(denormalise(vae, latents)).sample)


def test_decode_chunks_equals_stock_decode_of_the_residual_vae_that_folds_pixels():
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        is_residual=True,
    ).eval()

    with torch.no_grad():
        video = torch.cat(list(decode_chunks(vae, noise(3))), dim=2)
        assert video.shape[:3] == (1, 3, 9)
        assert torch.equal(video, vae.decode(denormalise(vae, noise(3))).sample)


def test_decode_chunks_stays_within_one():
    vae = tiny_vae()
    vae.decoder.conv_out.weight *= 100
    chunks = torch.cat(list(decode_chunks(vae, noise(2))), dim=2)

    assert chunks.min() == -1.0
    assert chunks.max() == 1.0


def test_decode_chunks_left_early_leaves_nothing_behind(vae):
    expected = torch.cat(list(decode_chunks(vae, noise(3))), dim=2)

    abandoned = decode_chunks(vae, noise(3, seed=1))
    next(abandoned)
    next(abandoned)
    other = decode_chunks(vae, noise(3, seed=2))
    next(other)

    assert torch.equal(torch.cat(list(decode_chunks(vae, noise(3))), dim=2), expected)
    assert not any(torch.is_tensor(kept) for kept in getattr(vae, "_feat_map", []))


def test_encode_norm_that_fails_midway_leaves_no_features_in_the_vae():
    vae = tiny_vae()
    broken = pixels(9)
    vae.quant_conv.register_forward_hook(lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        encode_norm(vae, broken)

    assert not any(torch.is_tensor(kept) for kept in vae._enc_feat_map)


@pytest.mark.parametrize("latent_frames", [2, 5])
def test_row_07_end_single_decode_equals_a_chunk_loop_with_fresh_features(vae, latent_frames):
    latents = noise(latent_frames)

    video = torch.cat(list(decode_end_single(vae, latents)), dim=2)

    assert torch.equal(video, first_frame_chunks_decode(vae, latents))


def test_row_07_end_single_encode_equals_a_chunk_loop_with_fresh_features(vae):
    video = pixels(18)

    two_calls = torch.cat([encode_norm(vae, video[:, :, :-1]), encode_norm(vae, video[:, :, -1:])], dim=2)

    assert torch.equal(two_calls, first_frame_chunks_encode(vae, video))


def test_end_single_decode_differs_from_the_causal_stream_only_in_the_last_latent(vae):
    latents = noise(4)
    alone = torch.cat(list(decode_end_single(vae, latents)), dim=2)
    stream = torch.cat(list(decode_chunks(vae, latents)), dim=2)

    assert torch.equal(alone[:, :, :9], stream[:, :, :9])
    assert not torch.equal(alone[:, :, -1], stream[:, :, -1])


@pytest.mark.parametrize(
    ("latent_frames", "plain", "end_single"),
    [(2, 5, 2), (5, 17, 14), (20, 77, 74), (21, 81, 78), (22, 85, 82)],
)
def test_row_09_decode_counts(vae, latent_frames, plain, end_single):
    latents = noise(latent_frames, height=1, width=1)

    assert sum(chunk.shape[2] for chunk in decode_chunks(vae, latents)) == plain
    assert sum(chunk.shape[2] for chunk in decode_end_single(vae, latents)) == end_single


def test_end_single_decode_sends_its_latents_at_once(vae, monkeypatch):
    sent = []
    monkeypatch.setattr(
        vae_module, "denormalise", lambda vae, latents: sent.append(latents.shape[2]) or denormalise(vae, latents)
    )

    for _ in decode_end_single(vae, noise(3)):
        pass

    assert sent == [3]


def test_end_single_decode_refuses_one_latent_frame(vae):
    with pytest.raises(ValueError, match="at least 2"):
        next(decode_end_single(vae, noise(1)))
