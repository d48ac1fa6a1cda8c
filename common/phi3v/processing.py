"""Processor for text and images, compatible with the published one, with support for batches."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jinja2 import Template
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import _compile_jinja_template

from .configuration import hub_repository
from .image_processing import Phi3VImageProcessor, upright_size

IMAGE_TAG = re.compile(r"<\|image_(\d{1,9})\|>")
# More than fit into a context of 128k tokens, at 301 or more each.
MAX_IMAGES = 512
END_OF_TURN = "<|end|>"
# Control tokens of the published tokenizers, except image tags. Others, such as <loc_1>, may be added and are part of answers.
SPECIAL_TOKEN = re.compile(r"<\|(?!image_\d{1,9}\|>)\w+\|>|</?s>|<unk>")

# Image tags, and the places before special tokens: the tokenizer treats the texts between them separately.
SECTION_END = re.compile(rf"<\|image_\d{{1,9}}\|>|(?={SPECIAL_TOKEN.pattern})")


def image_tag(number: int) -> str:
    """Tag of an image, by its number from 1."""
    return f"<|image_{number}|>"


def image_numbers(text: str) -> list[int]:
    """Numbers of the image tags in a text, in order of appearance."""
    return [int(number) for number in IMAGE_TAG.findall(text)]


def check_image_numbers(numbers: Sequence[int], num_images: int) -> None:
    """Check that the image tags are numbered consecutively from 1 to ``num_images``; a tag may be repeated.

    Raises
    ------
    ValueError
        If a tag has no image, an image has no tag, or a number is missing.
    """
    if sorted(set(numbers)) != list(range(1, num_images + 1)):
        tags = ", ".join(map(image_tag, sorted(set(numbers))[:5])) or "none"
        raise ValueError(
            f"the text's image tags ({tags}) do not match its {num_images} image{'' if num_images == 1 else 's'}: "
            f"number the tags consecutively from <|image_1|>, and give one image per tag"
        )


class Phi3VProcessor(ProcessorMixin):
    """Tokenizer and image processor in one.

    Parameters
    ----------
    image_processor : Phi3VImageProcessor
    tokenizer : PreTrainedTokenizerFast
    chat_template : str, optional
        Jinja template; by default, that of the tokenizer.
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
        # LlamaTokenizer, the class in the published files, rebuilds the tokenizer with its own rules, which tokenize many
        # strings differently. PreTrainedTokenizerFast uses tokenizer.json unchanged.
        kwargs.pop("trust_remote_code", None)
        return PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def img_tokens(self) -> list[str]:
        """Image tags in the order of their numbers. vLLM reads them."""
        return [image_tag(number) for number in range(1, MAX_IMAGES + 1)]

    def calc_num_image_tokens_from_image_size(self, width: int, height: int) -> int:
        """Number of tokens of an image of ``width`` × ``height`` pixels. vLLM calls it."""
        return self.image_processor.num_tokens(width, height)

    def chat_text(self, messages: list[dict[str, str]]) -> str:
        """Text of messages of the user, the assistant and, at the start, the system, up to the beginning of the next answer."""
        # apply_chat_template takes several times as long, because it also accepts messages that are not text.
        template = _compile(self.tokenizer.get_chat_template())
        return template.render(messages=messages, add_generation_prompt=True, **self.tokenizer.special_tokens_map)

    def tokenize(self, text: str, tokens_per_image: Sequence[int]) -> list[int]:
        """Tokenize a text and replace its image tags with negative placeholder ids.

        Parameters
        ----------
        text : str
            Text with tags ``<|image_1|>``, ``<|image_2|>``, ….
        tokens_per_image : sequence of int
            Number of tokens of each image.

        Returns
        -------
        list of int
            Token ids. The text between two tags starts with BOS, as in the training of the published weights. The tag of
            image k becomes ``tokens_per_image[k - 1]`` times the id −k.

        Raises
        ------
        ValueError
            If tags and images do not match.
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
        """Convert a text or a batch of texts, with their images, to model inputs.

        Parameters
        ----------
        text : str or sequence of str
            Prompt(s) with image tags.
        images : PIL.Image.Image or (nested) sequence of PIL.Image.Image, optional
            For a single text, an image or a list of images; for a batch, a list of lists (empty for text-only input).
        return_tensors : str, optional
            Only ``"pt"`` is supported.
        padding_side : {"left", "right"}, optional
            Side on which shorter texts of a batch are padded; by default, that of the tokenizer.

        Returns
        -------
        BatchFeature
            ``input_ids`` int64 (batch, length), −k for the tokens of image k of a text; ``attention_mask`` int64
            (batch, length); with images also ``pixel_values`` float32 (all images, num_crops + 1, 3, 336, 336) and
            ``image_sizes`` int64 (all images, 2), in the order of the texts.

        Raises
        ------
        ValueError
            If tags and images do not match.
        """
        kwargs.pop("padding", None)  # a batch is always padded
        # vLLM passes these, the second as the processor was loaded with.
        if kwargs.get("truncation") is False:
            del kwargs["truncation"]
        if kwargs.get("num_crops") == self.image_processor.num_crops:
            del kwargs["num_crops"]
        if kwargs or return_tensors not in (None, "pt"):
            raise ValueError(f"Phi3VProcessor accepts text, images and padding_side, got {kwargs or return_tensors!r}")
        texts = [text] if isinstance(text, str) else list(text)
        groups: Any = [images] if isinstance(text, str) else images or [[]] * len(texts)
        batch_images = [[group] if isinstance(group, Image.Image) else list(group or []) for group in groups]
        if len(batch_images) != len(texts):
            raise ValueError(
                f"expected one list of images per text, got {len(texts)} texts and {len(batch_images)} lists of images"
            )

        rows = []
        for row_text, row_images in zip(texts, batch_images, strict=True):
            tokens_per_image = [self.image_processor.num_tokens(*upright_size(image)) for image in row_images]
            rows.append(self.tokenize(row_text, tokens_per_image))
        data = pad_rows(rows, self.tokenizer.pad_token_id, padding_side or self.tokenizer.padding_side)
        all_images = [image for row_images in batch_images for image in row_images]
        if all_images:
            data.update(self.image_processor(all_images))
        return BatchFeature(data=data)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:  # type: ignore[override]  # no upload
        """Save the tokenizer files, ``preprocessor_config.json`` and ``processor_config.json`` in the published format."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(directory)
        # transformers 5 writes a tokenizer class unknown to earlier versions; all versions know the one written below.
        tokenizer_config = directory / "tokenizer_config.json"
        content = json.loads(tokenizer_config.read_text(encoding="utf-8"))
        for loading_argument in ("num_crops", "is_local", "local_files_only"):
            content.pop(loading_argument, None)
        if isinstance(content.get("extra_special_tokens"), list):
            # transformers 5 renamed this key, but still reads the published one. Earlier versions expect a dict in the new one.
            content["additional_special_tokens"] = content.pop("extra_special_tokens")
        code = f"{self._hub_repository()}--processing_phi3_v"
        auto_map = {"AutoProcessor": f"{code}.Phi3VProcessor"}
        processor = {"processor_class": "Phi3VProcessor", "auto_map": auto_map}
        _write_json(tokenizer_config, content | processor | {"tokenizer_class": "PreTrainedTokenizerFast"})
        image_processor = {
            "auto_map": {"AutoImageProcessor": f"{code}.Phi3VImageProcessor", **auto_map},
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


@cache
def _compile(chat_template: str) -> Template:
    template = _compile_jinja_template(chat_template)
    template.globals = dict(template.globals)  # copied for each text; reading the original, a ChainMap, takes most of the time
    return template


def stop_token_ids(processor: Phi3VProcessor) -> list[int]:
    """Token ids that end an answer: end of text and end of turn."""
    tokenizer = processor.tokenizer
    return [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)]


def end_of_conversation(processor: Phi3VProcessor) -> str:
    """Text after the last answer of a conversation: end of turn and end of text."""
    return f"{END_OF_TURN}\n{processor.tokenizer.eos_token}"


def control_token_ids(processor: Phi3VProcessor) -> set[int]:
    """Ids of the tokenizer's own control tokens, which are no part of an answer; tokens added by users are."""
    tokenizer = processor.tokenizer
    added = tokenizer.added_tokens_decoder.items()
    control = {index for index, token in added if token.special and SPECIAL_TOKEN.fullmatch(token.content)}
    return control | {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}


def pad_rows(rows: Sequence[Sequence[int]], pad_token_id: int, padding_side: str) -> dict[str, torch.Tensor]:
    """Pad rows of token ids to a batch.

    The attention mask is computed from the lengths, since the padding token can also be the last token of an answer.

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
