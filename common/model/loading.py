"""Load a model for training: precision, attention, trainable parameters, LoRA, QLoRA."""

from __future__ import annotations

import argparse

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available
from transformers.utils.import_utils import is_flash_attn_3_available, is_flash_attn_4_available

from common.arguments import Setup, trained_parts
from common.phi3v import Phi3VForCausalLM, Phi3VProcessor
from common.phi3v.attention import has_varlen_kernel
from common.phi3v.layers import use_plain_layers
from common.phi3v.parts import PARTS, part_of, unquantized_modules
from common.runtime.process import InputError, say

from .checkpoint import load_weights
from .checks import read_config
from .lora import add_lora, continue_lora

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_attention(requested: str | None, require_flash: bool, device: torch.device) -> tuple[str, str]:
    """Choose the attention implementation by ``--attn_implementation`` and ``--use_flash_attention``.

    Returns its name in transformers, and the reason for the choice.

    Raises
    ------
    InputError
        If a flash attention kernel is requested but not available.
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
    if requested and requested.startswith("flash_attention") and requested not in installed:
        raise InputError(
            f"flash-attn {requested[-1]} is not installed, or does not support this device",
            f"--attn_implementation {requested}",
        )
    if require_flash and not has_kernel and requested in (None, "varlen"):
        where = "a CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        raise InputError(
            f"no flash attention kernel runs on {where} (requires an NVIDIA GPU of the "
            "Ampere generation or newer); remove the flag",
            "--use_flash_attention",
        )
    if requested:
        return requested, "set by --attn_implementation"
    if require_flash and installed:
        return installed[0], "required by --use_flash_attention, and installed"
    if has_kernel:
        return "varlen", "PyTorch's variable-length flash attention kernel is available on this GPU"
    if device.type == "cpu":
        return "varlen", "on a CPU it runs SDPA one sample at a time"
    return "varlen", "this GPU has no flash attention kernel (compute capability below 8.0): it runs SDPA one sample at a time"


def use_liger_kernel(device: torch.device) -> None:
    """Make decoders that are created from now on use Liger's fused RMSNorm, SwiGLU and rotary embedding.

    Raises
    ------
    InputError
        If the kernels are not available.
    """
    if device.type != "cuda":
        raise InputError("Liger's kernels require a GPU; remove the flag", "--use_liger_kernel")
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_phi3
    except ImportError:
        raise InputError("liger-kernel is not installed: pip install liger-kernel==0.8.5", "--use_liger_kernel") from None
    apply_liger_kernel_to_phi3(cross_entropy=False, fused_linear_cross_entropy=False)


def training_precision(bf16: bool, device: torch.device) -> str:
    """Return ``"bf16"``, ``"fp16"`` or ``"fp32"``.

    Raises
    ------
    InputError
        If ``--bf16`` is set on a GPU that does not support it.
    """
    if bf16:
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise InputError(
                f"{torch.cuda.get_device_name(device)} does not support bf16; remove the flag to train in fp16", "--bf16"
            )
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def load_model(args: argparse.Namespace, setup: Setup, processor: Phi3VProcessor) -> nn.Module:
    """Load the base model, freeze the parts that are not trained, and add LoRA adapters.

    Parameters
    ----------
    args, setup
        The script's flags, and what :func:`common.training.start.start` determined from them.
    processor : Phi3VProcessor
        Provides the tokens that end an answer.

    Returns
    -------
    torch.nn.Module
        A ``Phi3VForCausalLM``, or a ``PeftModel`` that wraps one, in the training precision. Adapters are fp32, and so are
        weights that train in fp16 without DeepSpeed.

    Raises
    ------
    InputError
        If weights are corrupted, missing or have the wrong shape, or PEFT rejects the adapter settings.
    """
    say("Loading the model")
    device, compute_dtype = setup.device, DTYPES[setup.precision]
    base, adapters = setup.base or args.model_name_or_path, args.use_lora or args.use_qlora
    quantization = None
    if args.use_qlora:
        trains_tower = not args.freeze_vision_model and "vision" not in args.train_fully
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=unquantized_modules(read_config(base, setup.revision), vision=trains_tower),
        )
    if args.use_liger_kernel:
        use_liger_kernel(device)
    # Under DeepSpeed and in bf16, fp32 master weights are kept beside weights in the training precision. The scaler of fp16
    # requires gradients in fp32.
    scales_gradients = setup.precision == "fp16" and setup.deepspeed is None and not adapters
    model = load_weights(
        base,
        processor,
        setup.revision,
        "--model_name_or_path",
        dtype=torch.float32 if scales_gradients else compute_dtype,
        attn_implementation=setup.attention,
        quantization_config=quantization,
        # Load weights directly onto the GPU: going through CPU memory, each process would need a full copy there.
        device_map={"": device} if args.use_qlora or device.type == "cuda" else None,
    )
    avoid_avx512_kernel(model)
    if args.use_qlora:
        dequantize_scales(model)
    if not args.fused_layers:
        use_plain_layers(model)
    if args.use_liger_kernel:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        model.cross_entropy = LigerCrossEntropyLoss(reduction="sum")
    freeze(model, trained_parts(args.train_only, args.train_fully, args.freeze_vision_model))
    trained: nn.Module = model
    if setup.adapter:
        vision = not (args.freeze_vision_model or args.train_fully)
        trained = continue_lora(model, setup.adapter, vision, args.train_fully, args.fused_layers)
    elif adapters:
        trained = add_lora(model, args, setup.revision)
    return trained if args.use_qlora else trained.to(device)


def set_gradient_checkpointing(model: nn.Module, mode: str) -> None:
    """Recompute activations in the backward pass instead of storing them.

    Parameters
    ----------
    mode : {"full", "selective", "vision", "elementwise", "none"}
        Recompute all layers of the decoder and the vision tower; every second decoder layer and all of the vision tower; the
        vision tower; norms and activations only; nothing.
    """
    base = base_model(model)
    base.recompute_elementwise = mode == "elementwise"
    if mode in ("none", "elementwise"):
        base.gradient_checkpointing_disable()
        return
    attention = base.config.attention_dropout or base.config.tower.attention_dropout
    dropout = attention or any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
    base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": bool(dropout)})
    if mode in ("selective", "vision"):
        for layer in base.model.layers[:: 2 if mode == "selective" else 1]:
            layer.gradient_checkpointing = False  # type: ignore[assignment]  # not a parameter or module


def compile_layers(model: nn.Module) -> None:
    """Compile the layers of the decoder and of the vision tower, each kind once for all sizes of batches."""
    for layer in base_model(model).running_layers:
        layer.compile(dynamic=True)


def avoid_avx512_kernel(model: nn.Module) -> None:
    """Disable a CPU kernel for 4-bit layers that always computes in bf16 and has no backward pass."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":  # checked by name: bitsandbytes is imported only if weights are quantized
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # not a parameter or module


def dequantize_scales(model: nn.Module) -> None:
    """Keep the scales of 4-bit weights in fp32, which are quantized themselves (double quantization) when a model is loaded.

    Each use of a weight would dequantize them again, to the same values, in two kernels more. It takes 0.05 bytes per weight.
    """
    from bitsandbytes.functional import dequantize_blockwise  # only QLoRA needs it, and it is slow to import

    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and state.nested:
            state.absmax = dequantize_blockwise(state.absmax, state.state2).add_(state.offset).float()
            state.nested, state.state2, state.offset = False, None, None


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the numbers of trainable and of all parameters for each part of the model."""
    counts = dict.fromkeys(PARTS, (0, 0))
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # replaced by a trained copy
            continue
        # Under ZeRO-3, numel() is 0; bitsandbytes stores two 4-bit values per byte.
        count = getattr(parameter, "ds_numel", parameter.numel())
        count *= 2 if parameter.__class__.__name__ == "Params4bit" else 1
        trained, total = counts[part_of(name)]
        counts[part_of(name)] = trained + count * parameter.requires_grad, total + count
    return counts


def base_model(model: nn.Module) -> Phi3VForCausalLM:
    """Return the ``Phi3VForCausalLM`` itself, without the PEFT wrapper."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, Phi3VForCausalLM)
    return base


def freeze(model: Phi3VForCausalLM, parts: tuple[str, ...]) -> None:
    """Freeze every parameter that is not in one of the ``parts``, see :mod:`common.phi3v.parts`."""
    for name, parameter in model.named_parameters():
        if part_of(name) not in parts:
            parameter.requires_grad_(False)


def autocast(model: nn.Module, bf16: bool) -> torch.autocast:
    """Return the autocast context of training: bf16 or fp16; disabled in fp32."""
    device = base_model(model).device
    dtype = torch.bfloat16 if bf16 else torch.float16
    enabled = bf16 or device.type == "cuda"
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)
