"""Texts that join and leave a pool of 64 rows for 2,000 steps, drafted ahead and cut back: each is what it is alone, and the
pool has every page back in the end. Greedy and sampled.

    python benchmarks/pool_soak.py [--rows 64] [--steps 2000] --out benchmarks/results/pool_soak.json
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "state"))

from test_pool import crowd, tiny  # noqa: E402  # the test is the same at 6 rows and 120 steps

from plait.engine import Sampling  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--patterns", default="DF AF,[M|W]F GF")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = []
    for pattern in args.patterns.split(","):
        for sampling in (Sampling(), Sampling(temperature=1.5, top_p=0.95)):
            started = time.perf_counter()
            texts, tokens = crowd(tiny(pattern), args.rows, args.steps, sampling)
            row = {
                "pattern": pattern,
                "temperature": sampling.temperature,
                "rows": args.rows,
                "steps": args.steps,
                "texts": texts,
                "tokens": tokens,
                "differing": 0,  # or `crowd` would have raised
                "seconds": round(time.perf_counter() - started),
            }
            results.append(row)
            print(row, flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
