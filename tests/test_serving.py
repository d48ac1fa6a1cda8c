"""What vLLM's plugin entry point registers, with transformers alone. tests/serving/ runs vLLM itself."""

import tomllib
from importlib import import_module

import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from common.phi3v import Phi3VConfig, Phi3VProcessor
from common.phi3v.modeling import _slice_logits_to_keep


def entry_point(group: str, name: str) -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group][name]


def test_the_plugin_gives_vllm_its_configuration_and_processor():
    module, _, function = entry_point("vllm.general_plugins", "phi3v").partition(":")
    getattr(import_module(module), function)()  # importing has registered already; vLLM calls it as well
    assert isinstance(AutoConfig.from_pretrained(TINY), Phi3VConfig)
    processor = AutoProcessor.from_pretrained(TINY, num_crops=4)
    assert isinstance(processor, Phi3VProcessor)

    images = [Image.new("RGB", size, "white") for size in ((640, 300), (300, 900))]
    text = "".join(processor.img_tokens[:2])
    inputs = processor(text=text, images=images, truncation=False, num_crops=4, return_tensors="pt")
    for number, image in enumerate(images, start=1):
        tokens = processor.calc_num_image_tokens_from_image_size(width=image.width, height=image.height)
        assert (inputs["input_ids"] == -number).sum() == tokens
    for wrong in ({"num_crops": 2}, {"truncation": True}, {"max_length": 9}):
        with pytest.raises(ValueError, match="accepts text, images and padding_side, got"):
            processor(text=text, images=images, **wrong)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0, [[0, 1, 2], [3, 4, 5]]),
        (1, [[2], [5]]),
        (torch.tensor([0, 2]), [[0, 2], [3, 5]]),
        (torch.tensor([[0], [1]]), [[0], [4]]),
        (torch.tensor([[True, False, False], [False, True, True]]), [0, 4, 5]),
    ],
)
def test_logits_to_keep(keep, expected):
    states = torch.arange(6.0).view(2, 3, 1)
    assert _slice_logits_to_keep(states, keep).squeeze(-1).tolist() == expected
