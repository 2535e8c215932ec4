"""Kernels of a decoding step on a GPU: each is checked against float64 before it is timed inside a CUDA graph.

    python benchmarks/decode_kernels.py [--only paged,write] [--shapes 0,2] [--sweep] [--out FILE.json]

A time is the median over replays of a graph that holds the call once for each of several sets of tensors, as the layers of a
model are, so that together they do not fit the cache; by the number of calls. `floor` is what must be read and written at the
card's own copy speed, measured first. Errors are |got - want| / |want| over whole tensors, the largest over all checks.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import triton
from step_kernels.measuring import MOST_SETS, SETS_BYTES, Case, copy_speed, microseconds
from step_kernels.pages import check_all_paged, check_all_writes, paged_cases, write_cases
from step_kernels.rows import check_norms, check_small, norm_cases, small_cases
from step_kernels.tokens import STEPS, check_steps, step_cases

from plait.ops.attention.paged.plan import forced_plan

KERNELS = {"paged": (check_all_paged, paged_cases), "write": (check_all_writes, write_cases)}
KERNELS |= {"norm": (check_norms, norm_cases), "small": (check_small, small_cases)}
KERNELS |= {op: (partial(check_steps, op), partial(step_cases, op)) for op in STEPS}


def measured(case: Case, speed: float, sweep: bool) -> dict[str, Any]:
    n = max(1, min(MOST_SETS, int(SETS_BYTES / case.bytes) + 1))
    start = perf_counter()
    case.sets(1)[0]()
    torch.cuda.synchronize()
    first = perf_counter() - start
    row: dict[str, Any] = {"kernel": case.kernel, "shape": case.shape, "calls": n, "first_s": first}
    row["us"] = microseconds(case.sets(n))
    row["floor_us"] = 1e6 * case.bytes / speed
    row["GB/s"] = 1e-3 * case.bytes / row["us"]
    row["rivals"] = {name: microseconds(sets(n)) for name, sets in case.rivals.items()}
    if sweep and case.variants:
        runs, row["variants"] = case.sets(n), {}
        for name, sizes in case.variants.items():
            with forced_plan(**sizes):
                try:
                    row["variants"][name] = microseconds(runs)
                except (
                    RuntimeError,
                    triton.runtime.errors.OutOfResources,
                ) as error:  # more shared memory than there is
                    row["variants"][name] = str(error).splitlines()[0][:80]
    return row


def line(row: dict[str, Any]) -> str:
    rivals = "  ".join(f"{name} {us:.1f}" for name, us in row["rivals"].items())
    text = f"{row['kernel']:6} {row['shape']:70} {row['us']:8.1f} us (floor {row['floor_us']:6.1f}, {row['GB/s']:4.0f} GB/s)"
    text += f"  {rivals}"
    best = sorted((us, name) for name, us in row.get("variants", {}).items() if not isinstance(us, str))[:3]
    return text + "".join(f"\n{'':20}{us:8.1f} us with {name}" for us, name in best)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(KERNELS))
    parser.add_argument("--sweep", action="store_true", help="also time other sizes of the programs")
    parser.add_argument("--shapes", help="numbers of the shapes to time, all if left out")
    parser.add_argument("--check", action="store_true", help="check only")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    speed = copy_speed()
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_GB/s": speed / 1e9,
    }
    print(about, flush=True)
    rows = []
    for name in options.only.split(","):
        check, cases = KERNELS[name]
        start = perf_counter()
        print(f"{name}: right, {check():.2f} of what is allowed at most ({perf_counter() - start:.0f} s)", flush=True)
        torch.cuda.empty_cache()
        for number, case in enumerate(() if options.check else cases()):
            if options.shapes and str(number) not in options.shapes.split(","):
                continue
            rows.append(measured(case, speed, options.sweep))
            print(line(rows[-1]), flush=True)
            torch.cuda.empty_cache()
            if options.out:
                options.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
