"""Bytes of tensors without data."""

import torch

from autoround.forecast.count import ByteCount, without_data


def test_live_and_peak_of_tensors_and_their_views() -> None:
    with without_data(), ByteCount() as count:
        one = torch.empty(1000)
        view = one[10:].view(-1, 10)
        assert count.live["cpu"] == 4000
        two = view.double()
        assert count.live["cpu"] == 4000 + 990 * 8
        del one
        assert count.live["cpu"] == 4000 + 990 * 8  # the view keeps it
        del view, two
        assert (count.live["cpu"], count.peak["cpu"]) == (0, 4000 + 990 * 8)


def test_a_backward_pass_is_counted() -> None:
    with without_data(), ByteCount() as count:
        weight = torch.empty(100, 100, requires_grad=True)
        (gradient,) = torch.autograd.grad((torch.empty(50, 100) @ weight).exp().sum(), weight)
        held = count.live["cpu"]
    assert gradient.shape == (100, 100)
    assert held == 2 * 40_000
    # weight, inputs, gradient of the product and of the weight; the loss and its gradient
    assert count.peak["cpu"] == 2 * 40_000 + 2 * 20_000 + 2 * 4


def test_questions_that_need_data_are_answered() -> None:
    with without_data(), ByteCount() as count:
        values = torch.empty(6, 4)
        assert bool(torch.isfinite(values).all()) and int(torch.empty(2, dtype=torch.int64).sum()) == 0
        assert torch.empty(3).sum().item() == 0.0
        assert values[torch.empty(6, dtype=torch.bool)].shape == (6, 4)
        assert count.live["cpu"] == 96
