"""A random checkpoint that vLLM can load: its class fixes the vision tower and the id of the image token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from conftest import TINY

from common.phi3v import Phi3VConfig, Phi3VForCausalLM

VOCABULARY, IMAGE_TOKEN = 32064, 32044
CONTROL_TOKENS = {32000: "<|endoftext|>", 32001: "<|assistant|>", 32006: "<|system|>", 32007: "<|end|>", 32010: "<|user|>"}
CONTROL_TOKENS |= {IMAGE_TOKEN: "<|image|>"}


def write_model(directory: Path) -> Path:
    """Write a checkpoint with a small decoder, a tower of the published size and a vocabulary with the published ids."""
    shutil.copytree(TINY, directory, ignore=shutil.ignore_patterns("config.json", "model*", "generation_config.json"))
    write_tokenizer(directory / "tokenizer.json")
    settings = {"preprocessor_config.json": {"num_crops": 2}}
    # As in the published file: vLLM, which tokenizes a prompt twice, removes the space after these tokens only.
    settings |= {"tokenizer_config.json": {"additional_special_tokens": ["<|system|>", "<|end|>", "<|user|>"]}}
    for name, changes in settings.items():
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    config = Phi3VConfig(
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=32000,
        pad_token_id=32000,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={"type": "su", "short_factor": [1.0 + 0.01 * i for i in range(48)], "long_factor": [2.0] * 48},
        initializer_range=0.1,  # large, so that the answers depend on the pictures
        dtype="float32",
    )
    torch.manual_seed(0)
    model = Phi3VForCausalLM(config)
    model.generation_config.eos_token_id = [32000, 32007]  # type: ignore[union-attr]  # as the training scripts save it
    model.save_pretrained(directory)
    return directory


def write_tokenizer(path: Path) -> None:
    """Write a tokenizer of single characters that treats spaces as the published one does, with its ids of control tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    pieces += [f"▁word{index}" for index in range(len(pieces), 32000)]
    # The ids of added tokens have to be consecutive.
    control = {0: "<unk>", 1: "<s>", 2: "</s>"} | {index: f"<|placeholder{index}|>" for index in range(32000, 32045)}
    control |= CONTROL_TOKENS
    space, start = {"String": " "}, {"id": "<s>", "type_id": 0}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, "special": True, "rstrip": token in ("<|assistant|>", "<|image|>")}
            | dict.fromkeys(("single_word", "lstrip", "normalized"), False)
            for index, token in control.items()
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": space, "content": "▁"}],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": start}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": start}, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": [],
        },
    }
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
