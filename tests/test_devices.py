"""No function mixes devices: a run's functions on CUDA tensors, without a GPU; see pretend_cuda.py."""

from functools import partial
from types import SimpleNamespace

import adapters
import pytest
import torch
from conftest import TINY
from pretend_cuda import CUDA, CudaTensor, MixedDevices, pretend_cuda, to_cuda
from test_memory import settled
from transformers import AutoProcessor

from common.data.collator import Collator
from common.data.conversations import encode_conversation
from common.evaluation.generation import generate_with_log_probabilities
from common.phi3v import fused
from common.phi3v.flops import TrainingFlops
from common.training import memory
from common.training.trainer import FinetuningTrainer

PACKED = pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
METHODS = ("full", "frozen vision", "LoRA")


@pytest.fixture(scope="module")
def build(random_model):
    return partial(adapters.build, dtype=torch.bfloat16, base=random_model)


@pytest.fixture(scope="module")
def batches(random_model):
    processor = AutoProcessor.from_pretrained(random_model, num_crops=2)
    samples = [encode_conversation(conversation, processor) for conversation in adapters.conversations()]
    return {
        (packing, texts): Collator(processor, packing=packing)(samples[:1] if texts else samples)
        for packing in (True, False)
        for texts in (True, False)
    }


def moved(batch, stay=("image_sizes",)):
    """As the Trainer moves a batch."""
    return {name: value.to(CUDA) if torch.is_tensor(value) and name not in stay else value for name, value in batch.items()}


def test_mixed_devices_are_detected():
    with pretend_cuda():
        states = torch.ones(3, 4, device="cuda")
        assert isinstance(states, CudaTensor) and states.device == CUDA and states.is_cuda
        states[:, 1:] = 2
        assert states.sum().item() == 21 and states[0].tolist() == [1, 2, 2, 2]
        with pytest.raises(MixedDevices, match="add"):
            states + torch.ones(3, 4)
        with pytest.raises(MixedDevices, match="index"):
            torch.ones(3)[states[0].long()]
        assert (states + torch.ones(())).device == CUDA  # a scalar may be on the CPU
        assert states[torch.tensor([0, 2])].shape == (2, 4)  # and an index too
        assert not isinstance(states.cpu(), CudaTensor)


@PACKED
@pytest.mark.parametrize("stay", [(), ("image_sizes",)], ids=["all moved", "as in training"])
def test_flops_of_a_batch_on_the_gpu(build, batches, packing, stay):
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
def test_the_loss(build, batches, method, texts, packing):
    """Packed in bf16, for which there is a kernel; padded in fp32, which is faster on a CPU."""
    batch, model = batches[packing, texts], build(method, dtype=torch.bfloat16 if packing else torch.float32)
    expected = model(**batch).loss.item()
    with pretend_cuda():
        to_cuda(model)
        assert model(**moved(batch)).loss.item() == pytest.approx(expected, rel=1e-2)
        with fused.recompute_elementwise():
            assert model(**moved(batch)).loss.item() == pytest.approx(expected, rel=1e-2)


@torch.no_grad()
def test_the_loss_under_autocast(build, batches):
    model = build(dtype=torch.float32).requires_grad_(False)
    expected = model(**batches[True, False]).loss.item()
    with pretend_cuda():
        to_cuda(model)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = model(**moved(batches[True, False]))
            assert model.model.norm(torch.ones(1, 64, device="cuda")).dtype == torch.float32
        assert output.loss.item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(("method", "packing"), [("full", True), ("LoRA", False)])
@torch.no_grad()
def test_the_memory_estimate(build, method, packing, monkeypatch):
    batch = memory._batch  # the batch that measures the speed of a GPU is slow on a CPU
    monkeypatch.setattr(memory, "_batch", lambda images, text, *args: batch(min(images, 2), min(text, 160), *args))
    model = build(method).requires_grad_(method != "LoRA")  # autocast would record how it casts weights that train
    with pretend_cuda():
        to_cuda(model)
        flops = TrainingFlops(model.get_base_model() if method == "LoRA" else model)
        setup = SimpleNamespace(**vars(settled(bf16=True, packing=packing)) | {"device": CUDA})
        trial = memory.estimate_memory(model, setup, "adamw_torch", flops)
    assert trial.flops_per_second > 0 and trial.free == 80e9


def test_generation_and_answer_probabilities():
    """Prompts that share their beginning, a cache that grows, answers that end at different steps."""
    processor, (text, image, _) = AutoProcessor.from_pretrained(TINY, num_crops=1), adapters.conversations()
    asked = [text, image, image]
    args = SimpleNamespace(eval_batch_size=2, max_new_tokens=6, dataloader_num_workers=0, tqdm=False)
    model = adapters.build("LoRA").requires_grad_(False)
    expected, expected_scores = generate_with_log_probabilities(model, processor, asked, ("Noise.", "A"), args)
    with pretend_cuda():
        answers, scores = generate_with_log_probabilities(to_cuda(model), processor, asked, ("Noise.", "A"), args)
    assert len(answers) == len(asked) and scores.shape == expected_scores.shape
    # On a GPU, it generates in fp16. Answers about noise are not compared: several tokens are almost equally likely.
    assert answers[0] == expected[0]
    assert scores == pytest.approx(expected_scores, rel=1e-2)


@PACKED
def test_the_evaluation_loss(build, batches, packing):
    """The Trainer's own loop, with a stand-in for the Trainer that has only the attributes it reads."""
    batch = batches[packing, False]
    trainer = SimpleNamespace(
        flags=SimpleNamespace(bf16=True, tqdm=False, eval_metric_steps=None),
        setup=SimpleNamespace(batch_size_per_gpu=1),
        _num_eval_batches=2,
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
