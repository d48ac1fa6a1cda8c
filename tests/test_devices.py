"""No function mixes devices: the paths of a run on CUDA tensors, on a machine without a GPU; see pretend_cuda.py."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from peft import LoraConfig, get_peft_model
from PIL import Image
from pretend_cuda import CUDA, CudaTensor, MixedDevices, pretend_cuda, to_cuda
from test_memory import flags, settled
from transformers import AutoModelForCausalLM, AutoProcessor

from common.data.collator import Collator
from common.data.conversations import encode_conversation
from common.evaluation.generation import generate_and_compare
from common.model.lora import fuse_lora
from common.phi3v import fused
from common.phi3v.flops import TrainingFlops
from common.phi3v.parts import lora_targets
from common.training import memory
from common.training.trainer import FinetuningTrainer

PACKED = pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
METHODS = ("full", "frozen vision", "LoRA")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY, num_crops=2)


@pytest.fixture(scope="module")
def conversations():
    noise = [Image.effect_noise(size, 80).convert("RGB") for size in ((300, 200), (90, 90), (80, 90))]
    return [
        {"conversations": [{"images": images, "user": "What is it?", "assistant": "Noise."}]}
        for images in ([], noise[:1], noise[1:])
    ]


@pytest.fixture(scope="module")
def batches(processor, conversations):
    samples = [encode_conversation(conversation, processor) for conversation in conversations]
    return {
        (packing, texts): Collator(processor, packing=packing)(samples[:1] if texts else samples)
        for packing in (True, False)
        for texts in (True, False)
    }


def build(method="full", dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype, attn_implementation="varlen")
    if method == "frozen vision":
        model.model.vision_embed_tokens.requires_grad_(False)
    if method == "LoRA":
        config = LoraConfig(r=4, target_modules=lora_targets(model.config, vision=True), init_lora_weights=False)
        model = get_peft_model(model, config)
        fuse_lora(model)
    return model.train()


def moved(batch, stay=("image_sizes",)):
    """As the Trainer moves a batch."""
    return {name: value.to(CUDA) if torch.is_tensor(value) and name not in stay else value for name, value in batch.items()}


def test_mixed_devices_are_noticed():
    with pretend_cuda():
        states = torch.ones(3, 4, device="cuda")
        assert isinstance(states, CudaTensor) and states.device == CUDA and states.is_cuda
        states[:, 1:] = 2
        assert states.sum().item() == 21 and states[0].tolist() == [1, 2, 2, 2]
        with pytest.raises(MixedDevices, match="add"):
            states + torch.ones(3, 4)
        with pytest.raises(MixedDevices, match="index"):
            torch.ones(3)[states[0].long()]
        assert (states + torch.ones(())).device == CUDA  # a single number may come from the CPU
        assert states[torch.tensor([0, 2])].shape == (2, 4)  # and so may an index
        assert not isinstance(states.cpu(), CudaTensor)


@PACKED
@pytest.mark.parametrize("stay", [(), ("image_sizes",)], ids=["all moved", "as in training"])
def test_flops_are_counted_wherever_the_batch_is(batches, packing, stay):
    flops, batch = TrainingFlops(build()), batches[packing, False]
    with pretend_cuda():
        assert flops.sizes(moved(batch, stay)) == flops.sizes(batch)
        assert flops(moved(batch, stay)) == flops(batch)


@pytest.mark.parametrize(
    ("method", "texts", "packing"),
    [
        *((method, False, packing) for method in METHODS for packing in (True, False)),
        ("full", True, True),
        ("LoRA", True, False),
    ],
)
@torch.no_grad()
def test_the_loss(batches, method, texts, packing):
    """In bf16 where there is a kernel for it; otherwise fp32, which is faster on a CPU."""
    batch, model = batches[packing, texts], build(method, torch.bfloat16 if packing else torch.float32)
    expected = model(**batch).loss.item()
    with pretend_cuda():
        to_cuda(model)
        assert model(**moved(batch)).loss.item() == pytest.approx(expected, rel=1e-2)
        with fused.recompute_elementwise():
            assert model(**moved(batch)).loss.item() == pytest.approx(expected, rel=1e-2)


@torch.no_grad()
def test_the_loss_under_autocast(batches):
    model = build(dtype=torch.float32).requires_grad_(False)
    expected = model(**batches[True, False]).loss.item()
    with pretend_cuda():
        to_cuda(model)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = model(**moved(batches[True, False]))
            assert model.model.norm(torch.ones(1, 192, device="cuda")).dtype == torch.float32
        assert output.loss.item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(("method", "packing"), [("full", True), ("LoRA", False)])
@torch.no_grad()
def test_the_memory_estimate(method, packing, monkeypatch):
    batch = memory._batch  # the batch by which a GPU's speed is measured takes a CPU long
    monkeypatch.setattr(
        memory, "_batch", lambda model, images, text, *args: batch(model, min(images, 2), min(text, 160), *args)
    )
    model = build(method).requires_grad_(method != "LoRA")  # autocast would record how it casts weights that train
    with pretend_cuda():
        to_cuda(model)
        flops = TrainingFlops(model.get_base_model() if method == "LoRA" else model)
        setup = SimpleNamespace(**vars(settled(bf16=True, packing=packing)) | {"device": CUDA})
        trial = memory.estimate_memory(model, flags(bf16=True, use_lora=method == "LoRA"), setup, flops)
    assert trial.flops_per_second > 0 and trial.free == 80e9


@pytest.mark.parametrize("method", ["full", "LoRA"])
def test_generation_and_answer_probabilities(processor, conversations, method):
    """Prompts that share their beginning, a cache that grows, answers that end at different steps."""
    conversations = [*conversations, *conversations[1:]]
    args = SimpleNamespace(eval_batch_size=3, max_new_tokens=6, dataloader_num_workers=0, bf16=False, tqdm=False)
    model = build(method, torch.float32).requires_grad_(False)
    expected, expected_scores = generate_and_compare(model, processor, conversations, ("Noise.", "A"), args)
    with pretend_cuda():
        answers, scores = generate_and_compare(to_cuda(model), processor, conversations, ("Noise.", "A"), args)
    assert len(answers) == len(conversations) and scores.shape == expected_scores.shape
    # On a GPU, it answers in fp16. Answers about noise are left out: several tokens are nearly as likely.
    assert answers[0] == expected[0]
    assert scores == pytest.approx(expected_scores, rel=1e-2)


@PACKED
def test_the_evaluation_loss(batches, packing):
    """The Trainer's own loop on a model that is there; nothing of a Trainer is needed but what the loop reads."""
    batch = batches[packing, False]
    trainer = SimpleNamespace(
        flags=SimpleNamespace(batch_size_per_gpu=1, bf16=True, tqdm=False, eval_metric_steps=None),
        _eval_batches=2,
        eval_dataset=[1],
        state=None,
    )
    found = []
    for device in (torch.device("cpu"), CUDA):
        trainer.args, trainer.model = SimpleNamespace(device=device), build()
        with pretend_cuda():
            if device == CUDA:
                to_cuda(trainer.model)
            trainer._prepare_inputs = lambda inputs: FinetuningTrainer._prepare_inputs(trainer, inputs)
            found.append(FinetuningTrainer.evaluation_loop(trainer, [batch, batch]).metrics["eval_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-2)
