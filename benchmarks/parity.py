"""Every family of transformers that plait reads, under every law: results/parity.json, and the table in docs/families.md.

python benchmarks/parity.py [--seeds 3]
"""

import argparse
import json
from pathlib import Path

import torch
import transformers

from plait.cli.parity import by_family, said
from plait.hub.families import TRANSFORMERS
from plait.hub.parity import LAWS, TOLERANCE, parity

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "families.md"
MARK = "<!-- parity: made by benchmarks/parity.py -->\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    results = list(parity(TRANSFORMERS, seeds))
    for result in results:
        if result.message:
            print(f"{result.family}, seed {result.seed}, {result.law}: {result.message}")
    found = by_family(results)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    data = {**versions, "seeds": len(seeds), "tolerance": TOLERANCE, "largest_error": found}
    (HERE / "results" / "parity.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
    after = rest[rest.index("## ") :]
    PAGE.write_text(f"{before}{MARK}\n{table(found)}\n\n{after}", encoding="utf-8")


def table(found: dict[str, dict[str, float | None]]) -> str:
    rows = [f"| family | {' | '.join(LAWS)} |", f"|---|{'---|' * len(LAWS)}"]
    for name, row in found.items():
        rows.append(f"| `{name}` | {' | '.join('broken' if row[law] is None else said(row[law]) for law in LAWS)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
