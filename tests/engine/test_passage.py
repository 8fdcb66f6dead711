"""A small tensor reaches a card that is at work, and the host waits for none of that work."""

import pytest
import torch

from engine.conditioning import Given, condition
from engine.memo_encode import MemoEncoder
from engine.passage import to_device, to_host
from engine.vae import denormalise, encode_norm
from tests.engine.svi_parts import pixels, tiny_vae
from tests.engine.waiting import never_waiting


def test_tensor_that_is_where_it_is_wanted_stays_as_it_is() -> None:
    tensor = torch.arange(5)
    assert to_device(tensor, "cpu") is tensor


def test_copy_on_the_host_is_a_copy() -> None:
    tensor = torch.arange(5)
    copy = to_host(tensor)
    tensor.zero_()
    assert copy.tolist() == [0, 1, 2, 3, 4]


def test_tensor_whose_places_share_memory_is_sent_as_one_whose_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that is expanded; without a card, so nothing is locked and nothing leaves the host."""
    empty, sent = torch.empty, list[tuple[str, bool]]()
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory, **named: pin_memory and empty(*args, **named))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, *, non_blocking: sent.append((device, non_blocking)) or x)
    mask = torch.tensor([True, False, True]).expand(4, 3)
    made = to_device(mask, "cuda")
    assert sent == [("cuda", True)]
    assert made.is_contiguous()
    assert torch.equal(made, mask)


@pytest.mark.gpu
def test_values_arrive_in_the_order_of_the_cards_work() -> None:
    busy = torch.randn(4096, 4096, device="cuda")
    with never_waiting():
        for _ in range(50):
            busy = busy @ busy
        sent = [to_device(torch.full((1000,), float(i)), "cuda") for i in range(100)]
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.zeros(1000).to("cuda")  # what the plain way does
        expanded = to_device(torch.ones(1, 1, 1, 512, dtype=torch.bool).expand(1, 1, 512, 512), "cuda")
        back = [to_host(each) for each in sent]
        again = [each.to("cuda", non_blocking=True) for each in back]
    assert [float(each.sum()) for each in sent] == [1000.0 * i for i in range(100)]
    assert all(torch.equal(each, wanted) for each, wanted in zip(again, sent, strict=True))
    assert all(each.is_pinned() for each in back)
    assert bool(expanded.all())


@pytest.mark.gpu
def test_pictures_are_encoded_and_laid_out_without_the_host_waiting() -> None:
    vae = tiny_vae().to("cuda")
    given = Given(pixels(1, seed=1).cuda(), pixels(1, seed=2).cuda(), pixels(1, seed=3).cuda())
    memo = MemoEncoder(vae)

    def encode(video: torch.Tensor) -> torch.Tensor:
        return encode_norm(vae, video, memo.encode)

    with torch.inference_mode():
        wanted = condition("svi_latent", 5, given, encode)  # the first of a shape is compared, and waits for that
        with never_waiting():
            made = condition("svi_latent", 5, given, encode)
            raw = denormalise(vae, made[:, 4:])
    assert torch.equal(made, wanted)
    assert raw.is_cuda
