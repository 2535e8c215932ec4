"""`plait.load`: a model from whatever holds one, plait's own folders or another library's."""

from pathlib import Path

import torch

from plait.design.load import is_foreign
from plait.model.files import model_folder, read_model
from plait.model.language_model import LanguageModel
from plait.run_folder import check_model


def load(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
    """Read a saved model, the newest checkpoint of a training run's folder, or a folder of transformers whose family
    `plait.hub.families` has.

    Every tensor has the dtype that it has in the file, unless `dtype` says otherwise. Raises ValueError naming what is wrong,
    and the newest whole checkpoint where this one is damaged.
    """
    folder = check_model(model_folder(folder))
    if not is_foreign(folder):
        return read_model(folder, device, dtype)
    from plait.hub.checkpoint import read  # transformers takes a second to import

    return read(folder, device, dtype)
