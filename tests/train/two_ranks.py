"""Two processes train one run: run as `python two_ranks.py RUN.yaml FOLDER`, which writes FOLDER/said-0.json and said-1.json.

The second one's process gets a signal after step 2 of FOLDER/cut; its gradients are no numbers after step 2 of FOLDER/broken.
"""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from plait.train import TrainingStopped, load_run, train
from plait.train.ranks import Distributed

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
SOON = timedelta(seconds=120)  # a test that hangs, fails


def main(config: str, folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", SOON, world_size=2, rank=rank)
    ranks, said = Distributed(), []

    def interrupt(model, tokenizer, prompt: str) -> str:
        if rank:
            signal.raise_signal(signal.SIGTERM)
        return ""

    def harm(model, tokenizer, prompt: str) -> str:
        if rank:
            next(model.slots[0].parameters()).register_hook(lambda grad: grad * torch.nan)
        return ""

    for name, sample in (("cut", interrupt), ("broken", harm)):
        try:
            train(load_run(config, folder=str(folder / name)), sample=sample, console=Console(quiet=True), ranks=ranks)
        except TrainingStopped as stopped:
            said.append([type(stopped).__name__, str(stopped)])
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    second = os.fork()
    main(sys.argv[1], Path(sys.argv[2]), rank=int(second == 0))
    if second:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))
