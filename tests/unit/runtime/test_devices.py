"""How forward passes are computed: what a precision and a device come to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dery_cli.runtime import devices
from dery_cli.runtime.devices import Arithmetic, choose_arithmetic, forbid_tf32, pick_device

CPU = torch.device("cpu")


class Small(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, groups=groups)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize(
    ("precision", "device", "capability", "groups", "expected"),
    [
        ("auto", "cpu", "AVX2", 1, ("fp32", True)),
        ("auto", "cpu", "AVX2", 2, ("fp32", True)),
        ("auto", "cpu", "AVX512", 2, ("fp32", True)),
        ("bf16", "cpu", "AVX512_VNNI", 2, ("bf16", True)),
        ("auto", "cpu", "DEFAULT", 1, ("fp32", False)),
        ("auto", "cuda", "AVX512", 1, ("fp32", False)),
        ("fp16", "cuda", "AVX512", 2, ("fp16", True)),
        ("fp16", "mps", "DEFAULT", 1, ("fp16", False)),
    ],
)
def test_precision_and_layout_follow_from_the_kind_of_device_and_the_model(
    monkeypatch, precision, device, capability, groups, expected
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    found = choose_arithmetic(precision, torch.device(device), Small(groups))
    assert (found.precision, found.channels_last) == expected
    assert not choose_arithmetic(precision, CPU, nn.Linear(2, 2)).channels_last


def test_layout_moves_weights_and_changes_no_value():
    model, x = Small(), torch.randn(2, 4, 5, 5)
    weight, plain = model.conv.weight.clone(), model(x)
    arithmetic = Arithmetic(device=CPU, channels_last=True)
    assert arithmetic.prepared(model) is model
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.conv.weight, weight)
    assert arithmetic.laid_out(x).is_contiguous(memory_format=torch.channels_last)
    with arithmetic.computing():
        torch.testing.assert_close(model(arithmetic.laid_out(x)), plain)
    Arithmetic(device=CPU).prepared(model)
    assert model.conv.weight.is_contiguous()


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_layers_compute_in_the_precision_and_weights_stay_in_single(precision, dtype):
    layer = nn.Linear(8, 8)
    with torch.no_grad(), Arithmetic(device=CPU, precision=precision).computing():
        assert layer(torch.randn(3, 8)).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_a_layer_that_is_fitted_again_within_a_context_is_read_anew():
    """Autocast by itself goes on with the cast of the old weight."""
    layer, x = nn.Linear(4, 4, bias=False), torch.eye(4)
    with Arithmetic(device=CPU, precision="bf16").computing():
        for scale in (1.0, 2.0):
            with torch.no_grad():
                layer.weight.copy_(scale * torch.eye(4))
            assert torch.equal(layer(x).float(), scale * torch.eye(4))


def test_single_precision_is_exact():
    torch.backends.cudnn.allow_tf32 = True
    pick_device("cpu")
    assert not torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    forbid_tf32()
    assert not torch.backends.cuda.matmul.allow_tf32


def test_every_precision_is_known():
    for precision in devices.PRECISIONS:
        assert choose_arithmetic(precision, CPU, Small()).precision in devices.PRECISIONS[1:]
