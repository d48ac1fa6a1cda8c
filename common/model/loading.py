"""Load a model to train: precision, attention, what trains, LoRA, QLoRA."""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available
from transformers.utils.import_utils import is_flash_attn_3_available, is_flash_attn_4_available

from common.arguments import Setup, trained_parts, uses_adapters
from common.phi3v import Phi3VForCausalLM, Phi3VProcessor
from common.phi3v.attention import has_varlen_kernel
from common.phi3v.parts import PARTS, lora_targets, part_of, unquantized_modules
from common.phi3v.processing import stop_token_ids
from common.runtime import InputError

from .lora import fuse_lora

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_attention(asked: str | None, insist_on_flash: bool, device: torch.device) -> tuple[str, str]:
    """Choose the attention implementation.

    Parameters
    ----------
    asked : str, optional
        ``--attn_implementation``.
    insist_on_flash : bool
        ``--use_flash_attention``.
    device : torch.device

    Returns
    -------
    tuple of str
        Its name for transformers, and why it was chosen.

    Raises
    ------
    InputError
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
    if asked and asked.startswith("flash_attention") and asked not in installed:
        raise InputError(
            f"flash-attn {asked[-1]} is not installed, or finds no GPU that it runs on", f"--attn_implementation {asked}"
        )
    if asked and not (insist_on_flash and asked == "varlen" and not has_kernel):
        return asked, "asked for by --attn_implementation"
    if insist_on_flash:
        if not has_kernel:
            where = "a CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
            raise InputError(
                f"no flash kernel runs on {where} (it takes an NVIDIA GPU of the Ampere "
                "generation or later); leave the flag out",
                "--use_flash_attention",
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
    InputError
        Where they can't run.
    """
    if device.type != "cuda":
        raise InputError("Liger's kernels run on GPUs only; leave the flag out", "--use_liger_kernel")
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_phi3
    except ImportError:
        raise InputError("liger-kernel is not installed: pip install -r requirements-gpu.txt", "--use_liger_kernel") from None
    apply_liger_kernel_to_phi3(cross_entropy=False, fused_linear_cross_entropy=False)


def training_precision(bf16: bool, device: torch.device) -> str:
    """Return ``"bf16"``, ``"fp16"`` or ``"fp32"``.

    Raises
    ------
    InputError
        If ``--bf16`` is asked for on a GPU without it.
    """
    if bf16:
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise InputError(f"{torch.cuda.get_device_name(device)} has no bf16; leave the flag out to train in fp16", "--bf16")
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def load_model(args: argparse.Namespace, setup: Setup, processor: Phi3VProcessor) -> nn.Module:
    """Load the base model, freeze what doesn't train and add LoRA adapters.

    Parameters
    ----------
    args : argparse.Namespace
        The script's flags.
    setup : Setup
        What was settled of them.
    processor : Phi3VProcessor
        Knows the tokens that end an answer.

    Returns
    -------
    torch.nn.Module
        A ``Phi3VForCausalLM``, or a ``PeftModel`` around one. Weights that train are fp32 unless DeepSpeed keeps fp32
        master weights of its own; a base under adapters is in the training precision.

    Raises
    ------
    InputError
        If the weights are damaged, incomplete or of other shapes, or PEFT refuses the adapter.
    """
    device, compute_dtype = setup.device, DTYPES[setup.precision]
    if args.use_liger_kernel:
        use_liger_kernel(device)
    weights_stay = uses_adapters(args)
    # DeepSpeed casts what it is given before it makes its fp32 master weights.
    masters_elsewhere = setup.deepspeed is not None
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path,
            revision=setup.revision or "main",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which are refused by name below
            dtype=compute_dtype if weights_stay or masters_elsewhere else torch.float32,
            attn_implementation=setup.attention,
            quantization_config=_quantization(args, setup) if args.use_qlora else None,
            # A GPU's weights don't take the way through the machine's memory, of which every process would need as much.
            device_map={"": device} if args.use_qlora or device.type == "cuda" else None,
        )
    except SafetensorError as error:
        raise InputError(
            f"its weights can't be read ({error}): copy the checkpoint's files there again",
            f"--model_name_or_path {args.model_name_or_path}",
        ) from None
    misfits = sorted(loaded["missing_keys"]) + sorted(name for name, *_ in loaded["mismatched_keys"])
    if misfits:
        what = f"its weights lack {misfits[0]}, or have it in another shape ({len(misfits)} such)"
        raise InputError(f"{what}: copy the checkpoint's files there again", f"--model_name_or_path {args.model_name_or_path}")
    avoid_avx512_kernel(model)
    if args.use_liger_kernel:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        model.cross_entropy = LigerCrossEntropyLoss(reduction="sum")
    model.config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.eos_token_id = stop_token_ids(processor)
    _freeze(model, trained_parts(args))
    if uses_adapters(args):
        model = _add_lora(model, args, setup.revision)
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


def avoid_avx512_kernel(model: nn.Module) -> None:
    """Keep 4-bit layers from a CPU kernel that computes in bf16 whatever is asked for and has no backward pass."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":  # bitsandbytes is loaded only where weights are quantized
            module.support_avx512bf16_for_cpu = False


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


def _freeze(model: Phi3VForCausalLM, parts: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        if part_of(name) not in parts:
            parameter.requires_grad_(False)


def _quantization(args: argparse.Namespace, setup: Setup) -> BitsAndBytesConfig:
    config = AutoConfig.from_pretrained(args.model_name_or_path, revision=setup.revision or "main")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[setup.precision],
        llm_int8_skip_modules=unquantized_modules(config, vision=not args.freeze_vision_model),
    )


def _add_lora(model: Phi3VForCausalLM, args: argparse.Namespace, revision: str | None) -> nn.Module:
    try:
        config = LoraConfig(
            r=args.lora_rank,
            lora_alpha=round(args.lora_rank * args.lora_alpha_ratio),
            lora_dropout=args.lora_dropout,
            target_modules=lora_targets(model.config, vision=not args.freeze_vision_model),
            # PEFT's own choices by name are texts, but for its default (True) and none at all (False).
            init_lora_weights={"True": True, "False": False}.get(args.init_lora_weights, args.init_lora_weights),
            use_dora=args.use_dora,
            use_rslora=args.use_rslora,
            task_type="CAUSAL_LM",
            revision=revision,
        )
        model = get_peft_model(model, config)
    except (ValueError, ImportError) as error:
        raise InputError(f"PEFT refuses it ({error})", f"--init_lora_weights {args.init_lora_weights}") from error
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # Adapters are fp32: PEFT would copy their inputs to fp32, and autocast back.
            module.cast_input_dtype_enabled = False
    fuse_lora(model)
    return model


def autocast(model: nn.Module, bf16: bool) -> torch.autocast:
    """Autocast as in training: to bf16 or fp16 where weights are wider, else off."""
    device = base_model(model).device
    dtype = torch.bfloat16 if bf16 else torch.float16
    enabled = bf16 or device.type == "cuda"
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)
