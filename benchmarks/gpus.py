"""The GPUs that a process may use, as CUDA_VISIBLE_DEVICES names them for one of its own."""

import os

import torch


def gpus() -> list[str]:
    """One name each; without a GPU one that stands for none."""
    count = max(1, torch.cuda.device_count())
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")[:count]
