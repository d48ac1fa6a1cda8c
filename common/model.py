"""Load a model to train: precision, attention, what trains, LoRA, QLoRA."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available
from transformers.utils.import_utils import is_flash_attn_3_available, is_flash_attn_4_available

from .adapter_base import base_revision
from .arguments import PARTS
from .lora import fuse_lora
from .phi3v import Phi3VForCausalLM, Phi3VProcessor
from .phi3v.attention import has_varlen_kernel
from .progress import say

DECODER_LORA_MODULES = r"model\.layers\.\d+\.(self_attn\.(qkv_proj|o_proj)|mlp\.(gate_up_proj|down_proj))|lm_head"
TOWER = r"model\.vision_embed_tokens\.img_processor\.vision_model\.encoder\.layers"
TOWER_LINEARS = r"(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.(fc1|fc2))"
PROJECTOR_LORA_MODULES = r"model\.vision_embed_tokens\.img_projection\.(0|2)"


def fetch_checkpoint(name_or_path: str) -> str | None:
    """Check a model, and fetch all of it if it is on the hub, whose later commits then make no difference to a run.

    Returns
    -------
    str or None
        The commit that was fetched; None for a directory.

    Raises
    ------
    ValueError
        As :func:`check_checkpoint`.
    """
    check_checkpoint(name_or_path)
    revision = base_revision(name_or_path)
    if not Path(name_or_path).is_dir():
        try:
            patterns = ["*.json", "*.jinja", "*.safetensors"]
            check_checkpoint(snapshot_download(name_or_path, revision=revision, allow_patterns=patterns))
        except (OSError, HfHubHTTPError) as error:
            raise ValueError(
                f"--model_name_or_path {name_or_path} can't be fetched ({_first_line(error)}): try again"
            ) from None
    return revision


def check_checkpoint(name_or_path: str) -> None:
    """Check that a model is there, is a Phi-3-V, and has every file that loading needs.

    Raises
    ------
    ValueError
        Naming what is missing and what to do.
    """
    directory = Path(name_or_path)
    model_type = None
    if not directory.is_dir():
        looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1
        if looks_local:
            raise ValueError(f"--model_name_or_path {name_or_path}: there is no such directory, and it is no hub id")
        say(f"Fetching {name_or_path} from the hub, or from its cache")
        try:
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        except ValueError as error:  # a model type that transformers doesn't know, or has from the checkpoint's own code
            raise ValueError(
                f"--model_name_or_path {name_or_path} is not a phi3_v checkpoint, which these recipes finetune "
                f"(Phi-3-vision and Phi-3.5-vision): {_first_line(error)}"
            ) from None
        except OSError as error:
            raise ValueError(
                f"--model_name_or_path {name_or_path}: there is no such directory, and the hub can't be reached, or has no "
                f"such model ({_first_line(error)}); download it where there is access (hf download) and give its directory"
            ) from None
        model_type = config.model_type
    elif (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
        raise ValueError(
            f"--model_name_or_path {name_or_path} is an adapter: merge it into its base first "
            f"(python -m tools.merge_lora --adapter {name_or_path} --output_dir MERGED), and give that directory"
        )
    else:
        needed = ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]
        missing = [name for name in needed if not (directory / name).is_file()]
        if "tokenizer_config.json" not in missing and not _has_chat_template(directory):
            missing.append("chat_template.jinja")
        if "config.json" not in missing:
            model_type = _read_object(directory / "config.json").get("model_type")
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            shards = _shards(index)
            missing += [shard for shard in shards if not (directory / shard).is_file()]
        elif not (directory / "model.safetensors").is_file():
            missing.append("model.safetensors (or model.safetensors.index.json and its shards)")
        if missing and model_type in ("phi3_v", None):
            raise ValueError(
                f"--model_name_or_path {name_or_path} lacks {', '.join(missing)}: copy the checkpoint's files there again"
            )
    if model_type != "phi3_v":
        raise ValueError(
            f"--model_name_or_path {name_or_path} is a {model_type} checkpoint; these recipes finetune phi3_v: "
            "Phi-3-vision and Phi-3.5-vision"
        )


def choose_attention(args: argparse.Namespace, device: torch.device) -> tuple[str, str]:
    """Choose the attention implementation.

    Returns
    -------
    tuple of str
        Its name for transformers, and why it was chosen.

    Raises
    ------
    ValueError
        If a flash kernel is asked for where none runs.
    """
    has_kernel = has_varlen_kernel(device)
    generation = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    installed = [
        name
        for name, available, generations in (
            ("flash_attention_4", is_flash_attn_4_available, (9, 10, 11)),  # Hopper and Blackwell
            ("flash_attention_3", is_flash_attn_3_available, (9,)),  # Hopper
            ("flash_attention_2", is_flash_attn_2_available, range(8, 100)),
        )
        if generation in generations and available()
    ]
    asked = args.attn_implementation
    if asked and asked.startswith("flash_attention") and asked not in installed:
        raise ValueError(
            f"--attn_implementation {asked}: flash-attn {asked[-1]} is not installed, or finds no GPU that it runs on"
        )
    if asked and not (args.use_flash_attention and asked == "varlen" and not has_kernel):
        return asked, "asked for by --attn_implementation"
    if args.use_flash_attention:
        if not has_kernel:
            where = "a CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
            raise ValueError(
                f"--use_flash_attention: no flash kernel runs on {where} (it takes an NVIDIA GPU of the Ampere "
                "generation or later); leave the flag out"
            )
        if installed:
            return installed[0], "asked for by --use_flash_attention, and installed"
    if has_kernel:
        return "varlen", "PyTorch's own variable-length flash kernel runs on this GPU"
    if device.type == "cpu":
        return "varlen", "on a CPU it runs SDPA sample by sample"
    return "varlen", "this GPU is older than flash kernels (compute capability below 8.0): it runs SDPA sample by sample"


def use_liger_kernel(device: torch.device) -> None:
    """Let decoders that are built from now on use Liger's fused RMSNorm, SwiGLU and rotary embedding.

    Raises
    ------
    ValueError
        Where they can't run.
    """
    if device.type != "cuda":
        raise ValueError("--use_liger_kernel: Liger's kernels run on GPUs only; leave the flag out")
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_phi3
    except ImportError:
        raise ValueError("--use_liger_kernel: liger-kernel is not installed: pip install -r requirements-gpu.txt") from None
    apply_liger_kernel_to_phi3(cross_entropy=False, fused_linear_cross_entropy=False)


def training_precision(args: argparse.Namespace, device: torch.device) -> str:
    """Return ``"bf16"``, ``"fp16"`` or ``"fp32"``.

    Raises
    ------
    ValueError
        If ``--bf16`` is asked for on a GPU without it.
    """
    if args.bf16:
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError(f"--bf16: {torch.cuda.get_device_name(device)} has no bf16; leave the flag out to train in fp16")
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def load_processor(args: argparse.Namespace) -> Phi3VProcessor:
    """Load the processor with ``--num_crops``.

    Raises
    ------
    ValueError
        If one of its files can't be read.
    """
    try:
        return AutoProcessor.from_pretrained(
            args.model_name_or_path, revision=args.base_revision or "main", num_crops=args.num_crops
        )
    except Exception as error:  # tokenizers raises nothing more particular
        raise ValueError(
            f"--model_name_or_path {args.model_name_or_path}: the files of its tokenizer or image processor can't be read "
            f"({_first_line(error)}): copy them there again"
        ) from error


def load_model(args: argparse.Namespace, processor: Phi3VProcessor, device: torch.device) -> nn.Module:
    """Load the base model, freeze what doesn't train and add LoRA adapters.

    Parameters
    ----------
    args : argparse.Namespace
        As :func:`common.training.start` left them.
    processor : Phi3VProcessor
        Knows the tokens that end an answer.
    device : torch.device
        Where this process trains.

    Returns
    -------
    torch.nn.Module
        A ``Phi3VForCausalLM``, or a ``PeftModel`` around one. Weights that train are fp32 unless DeepSpeed keeps fp32
        master weights of its own; a base under adapters is in the training precision.

    Raises
    ------
    ValueError
        If the weights are damaged, incomplete or of other shapes, or PEFT refuses the adapter.
    """
    precision = training_precision(args, device)
    compute_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    if args.use_liger_kernel:
        use_liger_kernel(device)
    weights_stay = args.use_lora
    # DeepSpeed casts what it is given before it makes its fp32 master weights.
    masters_elsewhere = args.deepspeed is not None
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path,
            revision=args.base_revision or "main",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which are refused by name below
            dtype=compute_dtype if weights_stay or masters_elsewhere else torch.float32,
            attn_implementation=args.attention[0],
            quantization_config=_quantization_config(args, compute_dtype) if args.use_qlora else None,
            # A GPU's weights don't take the way through the machine's memory, of which every process would need as much.
            device_map={"": device} if args.use_qlora or device.type == "cuda" else None,
        )
    except SafetensorError as error:
        raise ValueError(
            f"--model_name_or_path {args.model_name_or_path}: its weights can't be read ({error}): "
            "copy the checkpoint's files there again"
        ) from None
    misfits = sorted(loaded["missing_keys"]) + sorted(name for name, *_ in loaded["mismatched_keys"])
    if misfits:
        what = f"its weights lack {misfits[0]}, or have it in another shape ({len(misfits)} such)"
        raise ValueError(f"--model_name_or_path {args.model_name_or_path}: {what}: copy the checkpoint's files there again")
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 its first evaluation repacks the weights for a kernel that has no backward pass.
            module.support_avx512bf16_for_cpu = False
    if args.use_liger_kernel:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        model.cross_entropy = LigerCrossEntropyLoss(reduction="sum")
    model.config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.eos_token_id = stop_token_ids(processor)
    _freeze(model, args)
    if args.use_lora:
        model = _add_lora(model, args)
    return model if args.use_qlora else model.to(device)


def set_gradient_checkpointing(model: nn.Module, mode: str) -> None:
    """Recompute layers in the backward pass instead of keeping what they computed.

    Parameters
    ----------
    mode : {"full", "selective", "none"}
        All layers of decoder and tower; all of the tower and every second one of the decoder; none.
    """
    base = base_model(model)
    if mode == "none":
        base.gradient_checkpointing_disable()
        return
    base.gradient_checkpointing_enable({"use_reentrant": False})
    if mode == "selective":
        for layer in base.model.layers[::2]:
            layer.gradient_checkpointing = False


def part_of(name: str) -> str:
    """The part of the model, ``"decoder"``, ``"vision"`` or ``"projector"``, that a parameter belongs to by its name."""
    if "vision_embed_tokens." not in name:
        return "decoder"
    return "vision" if ".img_processor." in name else "projector"


def stop_token_ids(processor: Phi3VProcessor) -> list[int]:
    """Ids that end an answer: the tokenizer's end of text, and the end of a turn."""
    tokenizer = processor.tokenizer
    return [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return, by part, how many parameters train and how many there are."""
    counts = dict.fromkeys(PARTS, (0, 0))
    for name, parameter in model.named_parameters():
        # ZeRO-3 keeps parameters elsewhere; bitsandbytes stores two 4-bit values a byte.
        count = getattr(parameter, "ds_numel", parameter.numel())
        count *= 2 if parameter.__class__.__name__ == "Params4bit" else 1
        trained, total = counts[part_of(name)]
        counts[part_of(name)] = trained + count * parameter.requires_grad, total + count
    return counts


def base_model(model: nn.Module) -> Phi3VForCausalLM:
    """The ``Phi3VForCausalLM`` itself, without PEFT's wrapping."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def _freeze(model: Phi3VForCausalLM, args: argparse.Namespace) -> None:
    parts = args.train_only or (("decoder",) if args.freeze_vision_model else PARTS)
    for name, parameter in model.named_parameters():
        if part_of(name) not in parts:
            parameter.requires_grad_(False)


def _quantization_config(args: argparse.Namespace, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    config = AutoConfig.from_pretrained(args.model_name_or_path, revision=args.base_revision or "main")
    # Names count from their beginning to a dot, so they stand here in full. The tower's last layer is never run.
    vision, last = "model.vision_embed_tokens", config.vision_config.num_hidden_layers - 1
    skip = ["lm_head", f"{vision}.img_projection", f"{vision}.img_processor.vision_model.encoder.layers.{last}"]
    if args.freeze_vision_model:
        skip.append(vision)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=skip,
    )


def _add_lora(model: Phi3VForCausalLM, args: argparse.Namespace) -> nn.Module:
    targets = DECODER_LORA_MODULES
    if not args.freeze_vision_model:
        # The tower's last layer is never run: an adapter there would wait for a gradient for ever.
        used = range(model.config.vision_config.num_hidden_layers - 1)
        layers = "|".join(map(str, used))
        targets += rf"|{TOWER}\.({layers})\.{TOWER_LINEARS}|{PROJECTOR_LORA_MODULES}"
    try:
        config = LoraConfig(
            r=args.lora_rank,
            lora_alpha=round(args.lora_rank * args.lora_alpha_ratio),
            lora_dropout=args.lora_dropout,
            target_modules=targets,
            # PEFT's own choices by name are texts, but for its default (True) and none at all (False).
            init_lora_weights={"True": True, "False": False}.get(args.init_lora_weights, args.init_lora_weights),
            use_dora=args.use_dora,
            use_rslora=args.use_rslora,
            task_type="CAUSAL_LM",
            revision=args.base_revision,
        )
        model = get_peft_model(model, config)
    except (ValueError, ImportError) as error:
        raise ValueError(f"--init_lora_weights {args.init_lora_weights}: PEFT refuses it ({error})") from error
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # Adapters are fp32: PEFT would copy their inputs to fp32, and autocast back.
            module.cast_input_dtype_enabled = False
    fuse_lora(model)
    return model


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is no index of weights ({error!r}): copy the checkpoint's files there again") from None


def _has_chat_template(directory: Path) -> bool:
    """Whether the tokenizer has one, in a file of its own or, as published, in its configuration."""
    return (directory / "chat_template.jinja").is_file() or "chat_template" in _read_object(directory / "tokenizer_config.json")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON object ({error}): copy the checkpoint's files there again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object, but a {type(content).__name__}: copy the checkpoint's files there again")
    return content


def _first_line(error: Any) -> str:
    return str(error).strip().splitlines()[0]
