"""The untrained tiny Phi-3-V, its tokenizer, and the codes that are the targets of its image tokens."""

import copy
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from common.phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor

from ..samples.page import COLOURS, SHAPES, Page

HUB_REPOSITORY = "microsoft/Phi-3.5-vision-instruct"
WIDTH = 192
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# Symbols of an image token: the characters in its left and right half, or a shape and its color.
GLYPHS = 95
LEFT, RIGHT = 0, GLYPHS + len(SHAPES)
ROW_END, VIEW_END = RIGHT + GLYPHS + len(COLOURS), RIGHT + GLYPHS + len(COLOURS) + 1
CODE_SCALE = 0.35
# Words with a token of their own, because the shape or color is a single symbol; other text is tokenized by character.
WORDS = (*SHAPES, *COLOURS)


def build(seed: int) -> tuple[Phi3VForCausalLM, Phi3VProcessor]:
    """Return the untrained model and its processor."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = Phi3VForCausalLM(build_config(tokenizer))
    model.config.vision_config._attn_implementation = "sdpa"
    codes = codebook()
    glyphs = codes[LEFT : LEFT + GLYPHS] + codes[RIGHT : RIGHT + GLYPHS]
    rows = tokenizer.convert_tokens_to_ids([chr(32 + i) for i in range(GLYPHS)] + list(WORDS))
    looks = torch.cat([glyphs, codes[LEFT + GLYPHS : RIGHT], codes[RIGHT + GLYPHS : ROW_END]])
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (module for module in layer.modules() if isinstance(module, torch.nn.Linear)):
                # The usual 0.02 is for much wider models.
                linear.weight.normal_(std=0.6 * linear.in_features**-0.5)
            # Initially, heads attend to similar tokens and copy their values.
            query, key, value = layer.self_attn.qkv_proj.weight.chunk(3)
            query.copy_(key)
            layer.self_attn.o_proj.weight.copy_(value.T)
        # The embedding of a character or word starts as the code of how it looks on a page.
        model.model.embed_tokens.weight.normal_(std=CODE_SCALE)[rows] = looks
        model.lm_head.weight[rows] = 0.1 * looks
    return model, Phi3VProcessor(Phi3VImageProcessor(num_crops=1), tokenizer)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters with the published special tokens."""
    characters = ["\n", *map(chr, range(32, 127)), *"£€¥§°·×–—‘’“”…•éèàçüöäß"]
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    vocabulary = {token: i for i, token in enumerate(special + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    # As in the published tokenizer, <|assistant|> absorbs the following newline, so the answer follows directly.
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, rstrip=token == "<|assistant|>") for token in special])
    tokenizer.add_tokens([AddedToken(word, normalized=False, single_word=True) for word in WORDS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=131072,
        padding_side="right",
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> Phi3VConfig:
    """Return the configuration: the image geometry of the real model, everything else small."""
    half_head = 16
    return Phi3VConfig(
        architectures=["Phi3VForCausalLM"],
        auto_map={
            "AutoConfig": f"{HUB_REPOSITORY}--configuration_phi3_v.Phi3VConfig",
            "AutoModelForCausalLM": f"{HUB_REPOSITORY}--modeling_phi3_v.Phi3VForCausalLM",
        },
        vocab_size=160,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_theta=10000.0,
        rope_scaling={
            "type": "su",
            "short_factor": [1.0] * half_head,
            "long_factor": [round(1 + 3 * (i / (half_head - 1)) ** 2, 3) for i in range(half_head)],
        },
        rms_norm_eps=1e-5,
        sliding_window=262144,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("</s>"),
        pad_token_id=tokenizer.pad_token_id,
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "num_channels": 3,
            "image_size": 336,
            "patch_size": 14,
            "hidden_act": "quick_gelu",
        },
    )


def codebook() -> torch.Tensor:
    """Return the codes of all symbols, float32 (symbols, WIDTH)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(VIEW_END + 1, WIDTH, generator=generator) * CODE_SCALE


def symbols(page: Page) -> np.ndarray:
    """Return the symbols of the 12 × 12 image tokens of a page as rows of the codebook, int64 (12, 12, 2)."""
    characters = np.vectorize(ord)(page.grid()) - 32
    both = np.stack([LEFT + characters[:, 0::2], RIGHT + characters[:, 1::2]], axis=-1)
    for shape in page.shapes:
        both[shape.row, shape.column] = (
            LEFT + GLYPHS + SHAPES.index(shape.kind),
            RIGHT + GLYPHS + list(COLOURS).index(shape.colour),
        )
    return both


def save(model, processor, output_dir: Path) -> None:
    """Write the checkpoint in the published layout, with weights in bfloat16."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
