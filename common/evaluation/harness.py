"""The model behind lmms-eval's interface: ``lmms-eval --model phi3v_native``, an entry point in pyproject.toml.

lmms-eval's tasks give the prompts and compute the metrics; batching, crops and the chat template are those of this repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from common.data.conversations import Conversation
from common.model.inference import load_for_inference
from common.runtime.process import InputError, world_size

from .generation import Answering, generate_with_log_probabilities

MANIFEST = ModelManifest("phi3v_native", simple_class_path=f"{__name__}.Phi3VNative")
DEFAULT_TOKENS = 1024


class Phi3VNative(lmms):
    """A full model or an adapter, on one device.

    Parameters
    ----------
    pretrained : str
        Directory or Hub id of a model or an adapter.
    device : str
        Device of the model.
    batch_size : int or str
        Prompts per batch.
    num_crops : int, optional
        Maximum number of crops per image. Default: as saved with the model.
    base : str, optional
        Base model of an adapter. Default: the one that it names.

    Raises
    ------
    InputError
        If the model cannot be loaded, or there are several processes.
    """

    def __init__(
        self,
        pretrained: str,
        device: str = "cuda" if torch.cuda.is_available() else "cpu",
        batch_size: int | str = 8,
        num_crops: int | None = None,
        base: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit():
            raise InputError(f"--batch_size {batch_size}: phi3v_native takes a number")
        if world_size() > 1:
            raise InputError("phi3v_native runs in one process: start lmms-eval without torchrun or accelerate launch")
        self.model, self.processor = load_for_inference(pretrained, device, base=base)
        self.processor.image_processor.num_crops = num_crops or self.processor.image_processor.num_crops
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the greedy answers, each cut off before the first of its request's ``until`` strings."""
        answers = [""] * len(requests)
        options = [request.args[1] for request in requests]
        for option in options:
            if option.get("do_sample") or (option.get("num_beams") or 1) > 1:
                raise InputError(f"phi3v_native decodes greedily, but the task asks for {option}")
        limits = [option.get("max_new_tokens") or DEFAULT_TOKENS for option in options]
        for limit in sorted(set(limits)):
            chosen = [index for index in range(len(requests)) if limits[index] == limit]
            found, _ = self._run([requests[index] for index in chosen], (), limit)
            for index, answer in zip(chosen, found, strict=True):
                until = options[index].get("until") or []
                for stop in [until] if isinstance(until, str) else until:
                    answer = answer.partition(stop)[0] if stop else answer
                answers[index] = answer
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the loss of each given answer, as lmms-eval expects, and False instead of whether it is the greedy one."""
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        answers = [_target(self.task_dict, request) for request in requests]
        for candidate in sorted(set(answers)):
            chosen = [index for index, answer in enumerate(answers) if answer == candidate]
            _, scores = self._run([requests[index] for index in chosen], (candidate,), 1)
            for index, [score] in zip(chosen, scores.tolist(), strict=True):
                results[index] = (-score, False)
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("phi3v_native has no multi-round generation")

    def _run(self, requests: list[Instance], candidates: Sequence[str], limit: int) -> Any:
        conversations, settings = _Conversations(requests, self.task_dict), Answering(self.batch_size, limit)
        return generate_with_log_probabilities(
            self.model, self.processor, conversations, candidates, settings, generate=not candidates
        )


class _Conversations(Sequence):
    """Requests as conversations, which load their images when they are read."""

    def __init__(self, requests: list[Instance], tasks: dict[str, Any]) -> None:
        self.requests = requests
        self.tasks = tasks

    def __len__(self) -> int:
        return len(self.requests)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...

    def __getitem__(self, index: Any) -> Any:
        context, _, doc_to_visual, number, task, split = self.requests[index].args
        images = doc_to_visual(self.tasks[task][split][number]) or []
        return {"conversations": [{"images": list(images), "user": context, "assistant": "?"}]}


def _target(tasks: dict[str, Any], request: Instance) -> str:
    _, target, _, number, task, split = request.args
    return (target(tasks[task][split][number]) if callable(target) else target).strip()
