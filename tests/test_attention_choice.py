"""Attention and precision by GPU and installed packages."""

from argparse import Namespace

import pytest
import torch

from common.model import loading
from common.phi3v import attention
from common.phi3v.attention import has_varlen_kernel


@pytest.mark.parametrize(
    ("capability", "installed", "options", "expected"),
    [
        ((8, 0), (), {}, "varlen"),
        ((9, 0), (2, 3), {}, "varlen"),
        ((9, 0), (), {"use_flash_attention": True}, "varlen"),
        ((8, 0), (2, 3), {"use_flash_attention": True}, "flash_attention_2"),
        ((9, 0), (2, 3), {"use_flash_attention": True}, "flash_attention_3"),
        ((9, 0), (2, 3, 4), {"use_flash_attention": True}, "flash_attention_4"),
        ((12, 0), (2, 3, 4), {"use_flash_attention": True}, "flash_attention_2"),
        ((8, 0), (2,), {"attn_implementation": "sdpa"}, "sdpa"),
        ((7, 5), (2,), {}, "varlen"),
        ((7, 0), (2,), {"use_flash_attention": True}, "no flash attention kernel runs on Some GPU"),
        ((7, 0), (2,), {"attn_implementation": "flash_attention_2"}, "does not support this device"),
        ((8, 0), (3,), {"attn_implementation": "flash_attention_3"}, "does not support this device"),
    ],
)
def test_attention_by_gpu_and_installed_packages(capability, installed, options, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    for number in (2, 3, 4):
        monkeypatch.setattr(loading, f"is_flash_attn_{number}_available", lambda number=number: number in installed)
    has_varlen_kernel.cache_clear()
    args = Namespace(**{"use_flash_attention": False, "attn_implementation": None} | options)
    try:
        chosen = loading.choose_attention(args.attn_implementation, args.use_flash_attention, torch.device("cuda"))[0]
    except ValueError as error:
        chosen = str(error)
    finally:
        has_varlen_kernel.cache_clear()
    assert expected in chosen


def test_bf16_on_a_gpu_without_support(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(ValueError, match="--bf16: Tesla V100 does not support bf16"):
        loading.training_precision(True, torch.device("cuda"))
    assert loading.training_precision(True, torch.device("cpu")) == "bf16"


@pytest.mark.parametrize("supported", [True, False], ids=["PyTorch 2.13", "PyTorch 2.11"])
@pytest.mark.parametrize("key_heads", [4, 2], ids=["as many key heads", "grouped key heads"])
def test_grouped_key_heads_with_both_signatures_of_the_kernel(monkeypatch, supported, key_heads):
    """``enable_gqa`` is a parameter of the kernel since PyTorch 2.13; before, key heads are repeated."""
    calls = []

    def known(query, key, value, *lengths, scale, window_size, enable_gqa=False):
        calls.append((key, value, enable_gqa))
        return query

    def unknown(query, key, value, *lengths, scale, window_size):
        calls.append((key, value, None))
        return query

    kernel = known if supported else unknown
    assert attention.supports_gqa(kernel) == supported
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "KERNEL_SUPPORTS_GQA", supported)
    query, key = torch.randn(5, 4, 8), torch.randn(5, key_heads, 8)
    attention.flash_attention(query, key, -key, torch.tensor([0, 5], dtype=torch.int32), 5, None)
    [(passed_key, passed_value, enabled)] = calls
    if supported or key_heads == 4:
        assert enabled in (key_heads == 2, None) and torch.equal(passed_key, key)
    else:
        assert torch.equal(passed_key, torch.stack([key[:, 0], key[:, 0], key[:, 1], key[:, 1]], dim=1))
        assert torch.equal(passed_value, -passed_key)
