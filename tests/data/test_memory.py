"""Five GiB on disk, sparse, and what of it comes into memory: measured in a process of its own."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

GIB = 1 << 30
MIB = 1 << 20
ROOM = 96 * MIB  # the order of 1.3 million pieces and its sort take 30

# Not ru_maxrss: a child starts with its parent's.
PEAK = """
import re

def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1]) * 1024
"""

LOADER = """
import itertools, json, sys
from plait.data import Loader, Shards

folder, order = sys.argv[1:]
shards = Shards(folder)
before = peak()
loader = Loader(shards, batch=8, length=2048, order=order)
count = sum(batch.inputs.numel() for batch in itertools.islice(loader, 40))
state = loader.state_dict()
again = Loader(shards, batch=8, length=2048, order=order)
again.load_state_dict(state)
next(again)
print(json.dumps({"tokens": count, "grown": peak() - before, "pieces": loader.pieces}))
"""

READER = """
import itertools, json, sys
from plait.data import ByteTokenizer, open_source

document = next(open_source(sys.argv[1]).documents())
before = peak()
tokenizer = ByteTokenizer()
read = sum(len(tokenizer.encode_batch([piece])[0]) for piece in itertools.islice(document.pieces, 3200))
print(json.dumps({"read": read, "grown": peak() - before}))
"""


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", PEAK + code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_a_loader_over_5_gib_of_tokens_reads_only_its_batches(counting_shards, order):
    folder = counting_shards([5, 5], [0, 1]).folder
    tokens = 5 * GIB // 2
    meta = json.loads((folder / "meta.json").read_text())
    meta |= {"dtype": "uint16", "tokens": tokens, "documents": 1, "tail_held_out": True, "vocab": 10}
    (folder / "meta.json").write_text(json.dumps(meta))
    with (folder / "tokens.bin").open("wb") as file:
        file.truncate(5 * GIB)
    (folder / "offsets.bin").write_bytes(b"".join(n.to_bytes(8, "little") for n in (0, tokens - 1000, tokens)))
    assert (folder / "tokens.bin").stat().st_size == 5 * GIB
    got = run(LOADER, folder, order)
    assert got["tokens"] == 40 * 8 * 2048
    assert got["pieces"] == -(-(tokens - 1000) // 2048)
    assert got["grown"] < ROOM


def test_a_text_file_of_5_gib_is_read_in_pieces(tmp_path):
    path = tmp_path / "big.txt"
    with path.open("wb") as file:
        file.write(b"some words of a text\n" * 1000)  # the sparse rest reads as zero bytes, which are UTF-8
        file.truncate(5 * GIB)
    got = run(READER, path)
    assert 190 * MIB < got["read"] < 210 * MIB
    assert got["grown"] < 32 * MIB
