"""Text with image tags and pictures to the model's inputs, as the published processor does it, and in batches."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .configuration import hub_repository
from .image_processing import Phi3VImageProcessor

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")


def image_numbers(text: str) -> list[int]:
    """Numbers of the image tags of a text, in the order in which they stand there."""
    return [int(number) for number in IMAGE_TAG.findall(text)]


def check_image_numbers(numbers: Sequence[int], num_images: int) -> None:
    """Check that the image tags are numbered 1 to ``num_images`` without a gap.

    Raises
    ------
    ValueError
        If a tag has no picture, a picture has no tag, or a number is left out.
    """
    if sorted(set(numbers)) != list(range(1, num_images + 1)):
        tags = ", ".join(f"<|image_{number}|>" for number in sorted(set(numbers))) or "none"
        raise ValueError(
            f"the text's image tags ({tags}) don't match its {num_images} picture(s): "
            f"number the tags from <|image_1|> without a gap and give one picture for each"
        )


class Phi3VProcessor(ProcessorMixin):
    """Tokenizer and image processor in one.

    Parameters
    ----------
    image_processor : Phi3VImageProcessor
    tokenizer : PreTrainedTokenizerFast
    chat_template : str, optional
        Jinja template; the tokenizer's by default.
    """

    def __init__(
        self,
        image_processor: Phi3VImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def _load_tokenizer_from_pretrained(cls, sub_processor_type, pretrained_model_name_or_path, **kwargs):
        # The class named in the published files, LlamaTokenizer, rebuilds the tokenizer by rules of its own and gets
        # many strings wrong; the plain class runs tokenizer.json as it stands.
        kwargs.pop("trust_remote_code", None)
        return PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **kwargs)

    def tokenize(self, text: str, tokens_per_image: Sequence[int]) -> list[int]:
        """Token ids of a text whose image tags are replaced by negative ids.

        Parameters
        ----------
        text : str
            Text with tags ``<|image_1|>``, ``<|image_2|>``, ….
        tokens_per_image : sequence of int
            Number of tokens of each picture.

        Returns
        -------
        list of int
            Every piece of text between tags starts with BOS, as the published weights were trained; picture k is
            ``tokens_per_image[k - 1]`` times the id −k.

        Raises
        ------
        ValueError
            If tags and pictures don't match.
        """
        pieces = IMAGE_TAG.split(text)
        numbers = [int(number) for number in pieces[1::2]]
        check_image_numbers(numbers, len(tokens_per_image))
        encoded = self.tokenizer(pieces[::2]).input_ids
        ids = list(encoded[0])
        for number, piece in zip(numbers, encoded[1:], strict=True):
            ids += [-number] * tokens_per_image[number - 1]
            ids += piece
        return ids

    def __call__(
        self,
        text: str | Sequence[str],
        images: Image.Image | Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | None = None,
        return_tensors: str | None = "pt",
        padding_side: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Turn one text, or a batch of texts, and their pictures into the model's inputs.

        Parameters
        ----------
        text : str or sequence of str
            Prompt(s) with image tags.
        images : picture(s), optional
            For one text a picture or a list of them; for a batch a list of lists (empty for text alone).
        return_tensors : str, optional
            Only ``"pt"``.
        padding_side : {"left", "right"}, optional
            Where shorter texts of a batch are padded; the tokenizer's by default.

        Returns
        -------
        BatchFeature
            ``input_ids`` int64 (batch, length), −k for the tokens of a text's picture k; ``attention_mask`` int64
            (batch, length); and if there are pictures ``pixel_values`` float32 (all pictures, num_crops + 1, 3, 336,
            336) and ``image_sizes`` int64 (all pictures, 2), in the order of the texts.

        Raises
        ------
        ValueError
            If tags and pictures don't match.
        """
        kwargs.pop("padding", None)  # a batch is always padded
        if kwargs or return_tensors not in (None, "pt"):
            raise ValueError(f"Phi3VProcessor takes text, images and padding_side; not {kwargs or return_tensors!r}")
        texts = [text] if isinstance(text, str) else list(text)
        if isinstance(text, str):
            batch_images = [[images] if isinstance(images, Image.Image) else list(images or [])]
        else:
            batch_images = [
                [item] if isinstance(item, Image.Image) else list(item or []) for item in (images or [[]] * len(texts))
            ]
        if len(batch_images) != len(texts):
            raise ValueError(f"{len(texts)} texts but {len(batch_images)} lists of pictures: give one list a text")

        rows = []
        for row_text, row_images in zip(texts, batch_images, strict=True):
            tokens_per_image = [self.image_processor.num_tokens(*image.size) for image in row_images]
            rows.append(self.tokenize(row_text, tokens_per_image))
        data = pad_rows(rows, self.tokenizer.pad_token_id, padding_side or self.tokenizer.padding_side)
        all_images = [image for row_images in batch_images for image in row_images]
        if all_images:
            data.update(self.image_processor(all_images))
        return BatchFeature(data=data)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:
        """Write the tokenizer's files, ``preprocessor_config.json`` and ``processor_config.json`` as published."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(directory)
        # transformers 5 names a class that no earlier version knows; both know this one.
        tokenizer_config = directory / "tokenizer_config.json"
        content = json.loads(tokenizer_config.read_text(encoding="utf-8"))
        for how_it_was_loaded in ("num_crops", "is_local", "local_files_only"):
            content.pop(how_it_was_loaded, None)
        if isinstance(content.get("extra_special_tokens"), list):
            # transformers 5's name for what it reads under the published one; earlier versions take a dict there, or fail.
            content["additional_special_tokens"] = content.pop("extra_special_tokens")
        code = f"{self._hub_repository()}--processing_phi3_v"
        processor = {
            "processor_class": "Phi3VProcessor",
            "auto_map": {"AutoProcessor": f"{code}.Phi3VProcessor"},
        }
        _write_json(tokenizer_config, content | processor | {"tokenizer_class": "PreTrainedTokenizerFast"})
        image_processor = {
            "auto_map": {"AutoImageProcessor": f"{code}.Phi3VImageProcessor", **processor["auto_map"]},
            "do_convert_rgb": self.image_processor.do_convert_rgb,
            "image_mean": self.image_processor.image_mean,
            "image_processor_type": "Phi3VImageProcessor",
            "image_std": self.image_processor.image_std,
            "num_crops": self.image_processor.num_crops,
            "num_img_tokens": self.image_processor.num_img_tokens,
            "processor_class": "Phi3VProcessor",
        }
        _write_json(directory / "processor_config.json", processor)
        _write_json(directory / "preprocessor_config.json", image_processor)
        return [str(directory / "processor_config.json")]

    def _hub_repository(self) -> str:
        owner, qualified, _ = self.tokenizer.init_kwargs.get("auto_map", {}).get("AutoProcessor", "").partition("--")
        return owner if qualified else hub_repository(self.tokenizer.name_or_path)


def stop_token_ids(processor: Phi3VProcessor) -> list[int]:
    """Ids that end an answer: the tokenizer's end of text, and the end of a turn."""
    tokenizer = processor.tokenizer
    return [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]


def pad_rows(rows: Sequence[Sequence[int]], pad_token_id: int, padding_side: str) -> dict[str, torch.Tensor]:
    """Pad token ids to a batch; the mask comes from the lengths, since the pad id also ends answers.

    Returns
    -------
    dict of str to torch.Tensor
        ``input_ids`` and ``attention_mask``, int64 (batch, longest row).
    """
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), pad_token_id)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        span = slice(length - len(row), length) if padding_side == "left" else slice(0, len(row))
        input_ids[index, span] = torch.tensor(row, dtype=torch.long)
        attention_mask[index, span] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
