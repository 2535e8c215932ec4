"""One training run in a process of its own. The run comes as a line of JSON on stdin; when stdin ends, it saves and stops.

So a study stops its runs by closing a pipe, and runs whose study was killed do not go on alone.
"""

import json
import os
import signal
import sys
import threading

import torch
from rich.console import Console

from plait.train import RunConfig, TrainingStopped, train

INTERRUPTED = 130


def main() -> int:
    """Trains; the exit code says how it went and the last line on stderr why."""
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    torch.set_num_threads(task["threads"])
    try:
        train(RunConfig.from_dict(task["run"]), console=Console(quiet=True))
    except TrainingStopped as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the run had begun
        return INTERRUPTED
    return 0


def _stop_at_end_of_input() -> None:
    while os.read(0, 4096):  # the descriptor itself: a thread inside sys.stdin would hold its lock when Python ends
        pass
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
