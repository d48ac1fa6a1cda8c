"""Check the files of a checkpoint before they are loaded.

A checkpoint can come from anyone, so only JSON and safetensors files are read, and code in it is never run. What transformers,
PyTorch or PEFT would fail on is checked first, so that a broken file is reported by its name and with a remedy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.activations import ACT2FN

from common.phi3v import Phi3VConfig, Phi3VForCausalLM
from common.phi3v.image_processing import CROP_SIZE, TOKENS_PER_SIDE
from common.runtime.files import read_json
from common.runtime.parser import may_be_on_hub
from common.runtime.process import InputError, say

from .quantization import SCALES, quantization_scheme, quantized_layers

COPY_AGAIN = "copy the checkpoint's files to this directory again"
SUPPORTED = "these recipes support only Phi-3-vision and Phi-3.5-vision"

# What values of a wrong type or form in a file cause in the libraries that read it; any other error is one of the code.
BAD_VALUES = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)

# Upper limits keep a broken file from filling the memory. The published models are at most a quarter of each.
LARGEST = {
    "vocab_size": 2**20,
    "hidden_size": 2**14,
    "intermediate_size": 2**16,
    "num_hidden_layers": 2**8,
    "num_attention_heads": 2**8,
    "num_key_value_heads": 2**8,
    "max_position_embeddings": 2**24,
    "original_max_position_embeddings": 2**24,
    "sliding_window": 2**24,
}
FIXED = {
    "model_type": "phi3_v",
    "tie_word_embeddings": False,
    "is_encoder_decoder": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}


def check_checkpoint(name_or_path: str, flag: str | None = None, revision: str | None = None) -> None:
    """Check that a model exists, is a Phi-3-V model, and has all files and weights that are required to load it.

    Of a model on the Hub, only the configuration is checked.

    Parameters
    ----------
    name_or_path : str
        Directory or Hub id.
    flag : str, optional
        The flag that gave it, for messages.
    revision : str, optional
        Commit of a Hub model. Default: the latest.

    Raises
    ------
    InputError
        The message names what is missing and how to fix it.
    """
    directory = Path(name_or_path)
    place = f"{flag} {name_or_path}" if flag else name_or_path
    if not directory.is_dir():
        if not may_be_on_hub(name_or_path):
            raise InputError("no such directory, and not a Hub id", place)
        say(f"Downloading {name_or_path} from the Hub, or using the cached files")
        read_config(name_or_path, revision, place)
        return
    if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
        raise InputError(
            f"{place} is an adapter: merge it into its base model first "
            f"(python -m tools.merge_lora --adapter {name_or_path} --output_dir MERGED), and pass that directory"
        )
    config = read_json(directory / "config.json", COPY_AGAIN) if (directory / "config.json").is_file() else {}
    if config.get("model_type", "phi3_v") != "phi3_v":
        raise InputError(f"{place} is a {config['model_type']} checkpoint, expected phi3_v; {SUPPORTED}")
    needed = ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]
    needed += [path.name for path in _weight_files(directory)] or ["model.safetensors"]
    missing = [name for name in needed if not (directory / name).is_file()]
    # As published, the template is in the tokenizer configuration.
    has_template = (directory / "chat_template.jinja").is_file()
    if needed[3] not in missing and not has_template and "chat_template" not in read_json(directory / needed[3], COPY_AGAIN):
        missing.append("chat_template.jinja")
    if missing:
        pickles = ", ".join(path.name for path in sorted(directory.glob("*.bin")))
        hint = f" ({pickles} is not read: a pickle can run code; convert it to safetensors)" if pickles else ""
        raise InputError(f"{place} is missing {', '.join(missing)}{hint}: {COPY_AGAIN}")
    _check_weights(directory, read_config(name_or_path), place)


def read_config(name_or_path: str, revision: str | None = None, place: str | None = None) -> Phi3VConfig:
    """Read and check the configuration of a model.

    Raises
    ------
    InputError
        If it cannot be read, or has a value that the model does not support.
    """
    path, place = Path(name_or_path) / "config.json", place or name_or_path
    if path.parent.is_dir():
        place = str(path)
        if shadowing := [key for key in read_json(path, COPY_AGAIN) if callable(getattr(Phi3VConfig, key, None))]:
            raise InputError(f"unexpected key {shadowing[0]!r}: {COPY_AGAIN}", place)
    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=revision or "main", trust_remote_code=False)
    except OSError as error:
        raise InputError(
            f"no such directory, and the Hub cannot be reached or has no such model ({first_line(error)}); download it on a "
            "machine with access (hf download) and pass its directory",
            place,
        ) from None
    except (*BAD_VALUES, StrictDataclassError) as error:  # ValueError also for a type that requires code from the checkpoint
        if path.parent.is_dir():
            raise InputError(f"cannot be read ({first_line(error)}): {COPY_AGAIN}", place) from error
        raise InputError(f"{place} is not a phi3_v checkpoint; {SUPPORTED}: {first_line(error)}") from error
    for fault in _config_faults(config):
        raise InputError(f"{fault}; {SUPPORTED}, whose files can be copied again", place)
    return config


def open_tensors(directory: Path) -> dict[str, Any]:
    """Open the files of a checkpoint that are loaded; return the open file for each tensor name."""
    return {name: file for path in _weight_files(directory) for name, file in open_file(path).items()}


def open_file(path: Path) -> dict[str, Any]:
    """Open a safetensors file, as :func:`open_tensors`.

    Raises
    ------
    InputError
        If it is damaged.
    """
    if not path.is_file():  # opening a FIFO would wait
        raise InputError(f"{path} is {'not a file' if path.exists() else 'missing'}: copy it again")
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is corrupted ({first_line(error)}): copy it again") from None
    return dict.fromkeys(file.keys(), file)


def first_line(error: Any) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def is_positive(value: Any) -> bool:
    """Whether a JSON value is a number above 0 that a tensor can hold."""
    return type(value) in (int, float) and 0 < value < 2**53


def _config_faults(config: Any) -> Iterator[str]:  # its values may have any type
    for key, value in FIXED.items():
        if getattr(config, key, value) != value:
            yield f"{key} must be {value}, got {getattr(config, key)!r}"
    if getattr(config, "quantization_config", None) is not None and quantization_scheme(config) is None:
        yield f"quantization_config must be one that tools.quantize writes, got {str(config.quantization_config)[:50]!r}"
    if config.dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        yield f"torch_dtype must be float32, bfloat16 or float16, got {config.dtype}"
    for part, where in ((config, ""), (config.vision_config, "vision_config.")):
        for key, limit in LARGEST.items():
            value = getattr(part, key, 1)
            if value is not None and (type(value) is not int or not 1 <= value <= limit):
                yield f"{where}{key} must be an integer from 1 to {limit:,}, got {value!r}"
        heads, key_heads = part.num_attention_heads, getattr(part, "num_key_value_heads", 1)
        if part.hidden_size % (2 * heads) or heads % key_heads:
            yield f"{where}num_attention_heads {heads} does not divide hidden_size {part.hidden_size} into even parts"
        if part.hidden_act not in ACT2FN:
            yield f"{where}hidden_act {part.hidden_act!r} is unknown"
        for key in ("rms_norm_eps", "layer_norm_eps"):
            if not is_positive(getattr(part, key, 1)):
                yield f"{where}{key} must be above 0, got {getattr(part, key)!r}"
        for key in ("attention_dropout", "embd_pdrop", "resid_pdrop"):
            if not 0 <= (getattr(part, key, 0) or 0) < 1:
                yield f"{where}{key} must be from 0 to 1, got {getattr(part, key)!r}"
    head_dim = config.hidden_size // config.num_attention_heads
    if getattr(config, "head_dim", head_dim) != head_dim:
        yield f"head_dim must be hidden_size / num_attention_heads, got {config.head_dim!r}"
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, key)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not 0 <= token < config.vocab_size:
                yield f"{key} must be from 0 to vocab_size, got {token}"
    rope, size = config.rope_parameters, head_dim // 2
    if rope["rope_type"] not in ("default", "longrope"):
        yield f"rope_scaling.type must be su or longrope, got {rope['rope_type']!r}"
    if not is_positive(rope["rope_theta"]) or rope.get("partial_rotary_factor", 1) != 1:
        yield f"rope_theta must be above 0 and partial_rotary_factor 1, got {rope['rope_theta']!r}"
    if rope["rope_type"] == "longrope" and config.original_max_position_embeddings == 1:
        yield "original_max_position_embeddings must be above 1"  # its logarithm is a divisor
    for key in ("short_factor", "long_factor") if rope["rope_type"] == "longrope" else ():
        factors = rope.get(key)
        if not isinstance(factors, list) or len(factors) != size or not all(map(is_positive, factors)):
            yield f"rope_scaling.{key} must be a list of {size} numbers above 0"
    vision = config.vision_config
    if (vision.image_size, vision.num_channels, config.tokens_per_crop_side) != (CROP_SIZE, 3, TOKENS_PER_SIDE):
        yield f"vision_config must have 3 channels and {2 * TOKENS_PER_SIDE} patches on each side of {CROP_SIZE} px"


def _check_weights(directory: Path, config: Phi3VConfig, place: str) -> None:
    """Compare the names and shapes of the weights with those of the model, before memory is allocated."""
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    files, scheme = open_tensors(directory), quantization_scheme(config)
    wrong = []
    if scheme:
        layers = quantized_layers(model)
        wrong += [name for layer in layers for part in SCALES[scheme] if (name := f"{layer}.{part}") not in files]
        for weight in (f"{layer}.weight" for layer in layers if scheme == "nf4"):
            expected[weight] = [math.prod(expected[weight]) // 2, 1]  # two weights per byte
    wrong += [name for name, shape in expected.items() if name not in files or files[name].get_slice(name).get_shape() != shape]
    if wrong:
        what = f"weight {wrong[0]} is missing or has the wrong shape ({len(wrong)} in total)"
        raise InputError(f"{what}: {COPY_AGAIN}", place)


def _weight_files(directory: Path) -> list[Path]:
    """Return what transformers and PEFT load: one file, even if there are also shards; they ignore all other files."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if index.is_file() and not single.exists():
        return [directory / name for name in _shards(index)]
    return [path for path in (single, directory / "adapter_model.safetensors") if path.exists()][:1]


def _shards(index: Path) -> list[str]:
    content = read_json(index, COPY_AGAIN)
    files: Any = content.get("weight_map")
    valid = isinstance(files, dict) and files and isinstance(content.get("metadata"), dict)
    # A name with a folder could lead out of the checkpoint.
    if not valid or not all(
        isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors") for name in files.values()
    ):
        raise InputError(f"{index} is not a valid weight index: {COPY_AGAIN}")
    return sorted(set(files.values()))
