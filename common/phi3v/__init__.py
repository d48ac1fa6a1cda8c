"""Phi-3-vision and Phi-3.5-vision for transformers 5; importing it registers them.

Imports no other package of :mod:`common` and knows nothing of training; the only place that knows the names of the model's
parts, what takes LoRA adapters, which tokens end a turn, and how many FLOPs a batch costs. Begin with
:mod:`common.phi3v.modeling`.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

# transformers 5.16 exports it only with torchvision, which this model does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration import Phi3VConfig
from .image_processing import Phi3VImageProcessor
from .modeling import Phi3VForCausalLM
from .processing import Phi3VProcessor


def register() -> None:
    """Register the model with transformers. vLLM calls this in each of its processes, see the entry point in pyproject.toml."""
    AutoConfig.register("phi3_v", Phi3VConfig, exist_ok=True)
    AutoModelForCausalLM.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
    AutoTokenizer.register(Phi3VConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
    AutoImageProcessor.register(Phi3VConfig, image_processor_classes={"pil": Phi3VImageProcessor}, exist_ok=True)
    AutoProcessor.register(Phi3VConfig, Phi3VProcessor, exist_ok=True)


register()

__all__ = ["Phi3VConfig", "Phi3VForCausalLM", "Phi3VImageProcessor", "Phi3VProcessor"]
