"""One thread a worker: the tensors here are small, and workers run side by side."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def gguf_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a GGUF file of a header and of tensors, each an array or one that is quantised already and its type."""
    import gguf

    add = {str: "add_string", bool: "add_bool", int: "add_uint32", float: "add_float32", list: "add_array"}

    def write(fields: Mapping[str, Any], tensors: Mapping[str, Any], name: str = "tiny.gguf") -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, fields.get("general.architecture", "llama"))
        for key, value in fields.items():
            if key != "general.architecture" and value is not None:
                getattr(writer, add[type(value)])(key, value)
        for key, tensor in tensors.items():
            array, kind = (tensor, None) if isinstance(tensor, np.ndarray) else tensor
            writer.add_tensor(key, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return write
