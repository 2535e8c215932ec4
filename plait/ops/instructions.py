"""Which precision a device multiplies matrices fast in, read from what it has: nothing is measured.

A processor without instructions for bfloat16 still takes it, one number at a time: 7 to 70 times slower than float32.
"""

import os

import torch

# oneDNN's names of instruction sets below the first with bfloat16 products; it is told not to go higher by these variables.
CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for its matrix products, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if cpu_bfloat16() else torch.float32
    return torch.float32


def cpu_bfloat16() -> str | None:
    """The processor's instructions for products of bfloat16 matrices, "AMX" or "AVX512_BF16"; None: it has none, or torch
    is built or told not to use them."""
    capped = any(os.environ.get(name, "").upper() in WITHOUT_BFLOAT16 for name in CAPS)
    if (
        capped
        or not torch.backends.mkldnn.is_available()
        or not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    ):
        return None
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512_BF16" if torch.cpu._is_avx512_bf16_supported() else None
