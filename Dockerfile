# For machines with NVIDIA GPUs, a driver for CUDA 13 and the NVIDIA container toolkit:
#   docker build --tag phi3v-finetuning .
#   mkdir -p data output ~/.cache/huggingface   # Docker would create them for root
#   docker run --gpus all --shm-size 16g --volume $PWD/data:/app/data --volume $PWD/output:/app/output \
#       --volume $HOME/.cache/huggingface:/cache phi3v-finetuning \
#       torchrun --nproc_per_node=8 finetune_hf_trainer_docvqa.py --bf16 --use_lora --output_dir output/docvqa
# PyTorch's wheels contain CUDA, so the base needs neither CUDA nor a compiler. Without a compiler, norms and activations run in the
# usual kernels, not in the faster ones that torch.compile builds, and ZeRO offloading and --torch_compile fail. The larger base
# python:3.12.11-bookworm has one.
FROM python:3.12.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# The mounted folders must be writable for this user: --build-arg UID=$(id -u).
ARG UID=1000
RUN useradd --create-home --uid "$UID" trainer && install --directory --owner trainer /app /cache
WORKDIR /app

# torch first: DeepSpeed's setup imports it. A change of the code does not install anything again.
COPY requirements.txt .
RUN pip install "$(grep '^torch==' requirements.txt)" setuptools==80.9.0 wheel==0.45.1 \
    && DS_IGNORE_CUDA_DETECTION=1 pip install --requirement requirements.txt

COPY --chown=$UID . .
USER $UID
CMD ["python", "-m", "tools.reproduce", "--list"]
