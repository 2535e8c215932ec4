"""Training: one run config, one loop, checkpoints that resume to the bit. The config loads without torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from plait.run_folder import checkpoints as checkpoints
from plait.run_folder import latest as latest
from plait.train.config import DataConfig as DataConfig
from plait.train.config import RunConfig as RunConfig
from plait.train.config import load_run as load_run
from plait.train.errors import Ended as Ended
from plait.train.errors import Interrupted as Interrupted
from plait.train.errors import NonFinite as NonFinite
from plait.train.errors import SaveFailed as SaveFailed
from plait.train.errors import TrainingStopped as TrainingStopped
from plait.train.errors import Unsolved as Unsolved

if TYPE_CHECKING:
    from plait.train.heldout import HeldOut as HeldOut
    from plait.train.heldout import heldout_loss as heldout_loss
    from plait.train.loop import train as train
    from plait.train.result import Result as Result

_LAZY = {
    "HeldOut": "plait.train.heldout",
    "heldout_loss": "plait.train.heldout",
    "Result": "plait.train.result",
    "train": "plait.train.loop",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'plait.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
