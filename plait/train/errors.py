"""Why a run stopped before its last step. Each message is one line that says what to do next."""

from pathlib import Path


class TrainingStopped(RuntimeError):
    """`folder` is the run; `checkpoint` its newest good checkpoint, None where there is none yet."""

    exit_code = 1

    def __init__(self, message: str, folder: Path, checkpoint: Path | None):
        super().__init__(message)
        self.folder, self.checkpoint = folder, checkpoint


class Interrupted(TrainingStopped):
    """Ctrl-C or SIGTERM: the step was finished and saved."""

    exit_code = 130


class NonFinite(TrainingStopped):
    """Loss or gradient is NaN or infinite; the message names the layer where it began."""


class Unsolved(TrainingStopped):
    """A recurrent layer that is `strict` needed more passes than it has; the message names it."""


class SaveFailed(TrainingStopped):
    """The disk refused a checkpoint; the ones before it are whole."""


class Ended(TrainingStopped):
    """The batches of one's own came to an end before the run's last step."""
