"""Chunked recurrences on a GPU, plait's kernels and flash-linear-attention's: errors beside float64 loops, then times.

python benchmarks/ops_gpu.py --out FILE     all of it, every op in a subprocess of its own, which a broken kernel may kill
python benchmarks/ops_gpu.py errors OP K    one op's errors, K = V
python benchmarks/ops_gpu.py times OP       one op's times

flash-linear-attention refuses gated gradients with some versions of Triton. Where it does, its guard is switched off here, which is
said beside the numbers: they are then of kernels that their authors hold to be wrong there.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

OPS = ("ssd", "delta", "kda", "gla")
SIZES = (128, 64)
FORMS = ("chunks", "fla")
GATES = ("gentle", "mixed")
BOUND = 1.5e-2  # of plait's own errors; fla's are shown
NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dbeta", "dstate")
B, T, H, K = 8, 4096, 16, 128  # of what is timed
LIMIT = 240  # seconds of one subprocess


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", help="a JSON file for all numbers")
    out, started = parser.parse_args().out, time.time()
    found = {"errors": [], "times": [], "failed": []}
    jobs = [("errors", op, size) for size in SIZES for op in OPS] + [("warm", op) for op in OPS]
    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:  # compilation, side by side
        done = list(pool.map(_subprocess, jobs))
    print(f"errors and compilation: {time.time() - started:.0f} s", flush=True)
    for job in [("times", op) for op in OPS]:  # one after the other
        done.append(_subprocess(job))
    for job, rows, error in done:
        if error:
            found["failed"].append({"job": " ".join(map(str, job)), "error": error})
        elif job[0] != "warm":
            found[job[0]] += rows
    found["seconds"] = round(time.time() - started)
    show(found)
    if out:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    wrong = [row for row in found["errors"] if row["form"] == "chunks" and not row["worst"] <= BOUND]
    sys.exit(1 if wrong or any("chunks" in row["error"] for row in found["failed"]) else 0)


def _subprocess(job):
    """(job, what it found, or None and why not)."""
    environment = os.environ | ({} if job[0] == "times" else {"FLA_CACHE_RESULTS": "0"})  # tuned where nothing else runs
    try:
        done = subprocess.run(
            [sys.executable, __file__, *map(str, job)],
            capture_output=True,
            encoding="utf-8",
            env=environment,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return job, [], f"took longer than {LIMIT} s"
    if done.returncode:
        return job, [], " | ".join((done.stdout + done.stderr).strip().splitlines()[-3:])[-400:]
    return job, json.loads(done.stdout.strip().splitlines()[-1]), None


def show(found):
    print("\nrelative errors, B 2, T 300 (and packed), H 4, bf16, with states; * with fla's guard off\n")
    print(f"{'op':6}{'K=V':>5}  {'gates':7} {'form':8}" + "".join(f"{name:>9}" for name in NAMES))
    for row in found["errors"]:
        cells = "".join(f"{row[name]:9.1e}" if name in row else f"{'-':>9}" for name in NAMES)
        form = row["form"] + ("*" if row["guard_off"] else "")
        print(f"{row['op']:6}{row['K']:5}  {row['gates']:7} {form:8}{cells}  {row.get('note', '')}")
    print(f"\nms at B {B}, T {T}, H {H}, K = V = {K}, bf16, medians of 10\n")
    print(f"{'op':6} {'form':8}{'forward':>9}{'and backward':>14}")
    for row in found["times"]:
        both = "failed" if row["both_ms"] is None else f"{row['both_ms']:.2f}"
        form = row["form"] + ("*" if row["guard_off"] else "")
        print(f"{row['op']:6} {form:8}{row['forward_ms']:9.2f}{both:>14}  {row.get('note', '')}")
    for row in found["failed"]:
        print(f"\nFAILED {row['job']}: {row['error']}")
    machine = found["times"][0]["machine"] if found["times"] else "no times"
    print(f"\n{machine}; {found['seconds']} s in all")


def inputs(op, b, t, h, size, gates):
    """q, k, v in bfloat16, g and beta in float32."""
    import torch
    import torch.nn.functional as F

    def randn(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    generator = torch.Generator("cuda").manual_seed(t + size)
    q, k, v = randn(b, t, h, size), F.normalize(randn(b, t, h, size), dim=-1), randn(b, t, h, size)
    u = torch.rand(b, t, h, *([size] if op in ("kda", "gla") else []), device="cuda", generator=generator)
    g = {"gentle": -0.1 * u, "mixed": -20 * u**6}[gates]
    beta = [torch.rand(b, t, h, device="cuda", generator=generator)] if op in ("delta", "kda") else []
    return [q.bfloat16(), k.bfloat16(), v.bfloat16(), g, *beta]


def run(op, form, *given, state=None, packing=None):
    from plait.ops import delta, gla, ssd
    from plait.ops.kernels import forced

    call = {"ssd": ssd.ssd, "delta": delta.gated_delta, "kda": delta.gated_delta, "gla": gla.gla}[op]
    with forced(form):
        return call(*given, scale=given[1].shape[3] ** -0.5, state=state, packing=packing)


@contextmanager
def guard_off():
    """flash-linear-attention's own refusal of gated gradients, and plait's that follows it."""
    from unittest.mock import patch

    import fla.ops.common.chunk_o as theirs

    from plait.ops import fla as ours

    with patch.object(ours, "_gradients", lambda call, op: None), patch.object(theirs, "TRITON_ABOVE_3_7_1", True):
        yield


def refused(op):
    """Whether plait's form "fla" refuses gradients here; that it does where flash-linear-attention does, and only there, is held."""
    from unittest.mock import patch

    import torch

    from plait.ops import fla as ours

    def gradients():
        leaves = [x.requires_grad_() for x in inputs(op, 1, 128, 2, 64, "gentle")]
        torch.autograd.grad(run(op, "fla", *leaves)[0].sum(), leaves)

    def raised(kind):
        try:
            gradients()
        except kind as error:
            return str(error)
        return None

    mine = raised(ValueError)
    with patch.object(ours, "_gradients", lambda call, op: None):
        its = raised(RuntimeError)
    if (mine is None) != (its is None):
        raise SystemExit(f"plait says {mine!r} where fla says {its!r}")
    return mine is not None


def with_gradients(call, given):
    import torch

    leaves = [x.detach().clone().requires_grad_() for x in given]
    generator = torch.Generator("cuda").manual_seed(3)
    outputs = call(*leaves)[:2]
    weights = [torch.randn(x.shape, device="cuda", generator=generator).double() for x in outputs]
    loss = sum((x.double() * w).sum() for x, w in zip(outputs, weights, strict=True))
    return [*(x.detach() for x in outputs), *torch.autograd.grad(loss, leaves)]


def errors(op, size):
    import torch

    from plait.ops.packing import Packing

    rows, off = [], refused(op)
    names = [name for name in NAMES if name != "dbeta" or op in ("delta", "kda")]
    documents = (63, 1, 200, 36)
    packings = (None, Packing.of_lengths(documents, torch.device("cuda")))
    for gates in GATES:
        cases = []
        for packing in packings:
            b = 2 if packing is None else 1
            given = inputs(op, b, 300, 4, size, gates)
            states = b if packing is None else len(documents)
            given.append(torch.randn(states, 4, size, size, device="cuda") / 4)

            def call(form, *x, packing=packing):
                return run(op, form, *x[:-1], state=x[-1], packing=packing)

            truth = with_gradients(lambda *x, call=call: call("reference", *x), [x.double() for x in given])
            cases.append((given, call, truth))
        for form in FORMS:
            row = {"op": op, "K": size, "gates": gates, "form": form, "guard_off": form == "fla" and off}
            for given, call, truth in cases:
                if form == "fla":
                    with guard_off():
                        got = with_gradients(lambda *x, call=call: call("fla", *x), given)
                else:
                    got = with_gradients(lambda *x, call=call: call("chunks", *x), given)
                for name, x, z in zip(names, got, truth, strict=True):
                    error = float((x.double() - z).norm() / z.norm()) if x.isfinite().all() else float("inf")
                    row[name] = max(row.get(name, 0.0), error)
            row["worst"] = max(row[name] for name in names)
            rows.append(row)
    return rows


def times(op, rounds=10):
    import torch

    rows, off = [], refused(op)
    leaves = [x.requires_grad_() for x in inputs(op, B, T, H, K, "gentle")]
    do = torch.randn_like(leaves[2])
    versions = f"torch {torch.__version__}, Triton {_version('triton')}, fla {_version('flash-linear-attention')}"
    for form in FORMS:
        row = {"op": op, "form": form, "guard_off": form == "fla" and off, "both_ms": None}
        row["machine"] = f"{torch.cuda.get_device_name()}, {versions}"

        def forward(form=form):
            with torch.no_grad():
                run(op, form, *leaves)

        def both(form=form):
            torch.autograd.grad(run(op, form, *leaves)[0], leaves, do)

        row["forward_ms"] = clocked(forward, rounds)
        torch.cuda.empty_cache()
        if form == "fla":
            with guard_off():
                row["both_ms"] = clocked(both, rounds)
        else:
            row["both_ms"] = clocked(both, rounds)
        rows.append(row)
    return rows


def _version(package):
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def clocked(call, rounds):
    """Median milliseconds."""
    import torch

    for _ in range(3):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    spans = sorted(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False))
    return (spans[(rounds - 1) // 2] + spans[rounds // 2]) / 2


if __name__ == "__main__":
    mode = sys.argv[1:2]
    if mode == ["errors"]:
        print(json.dumps(errors(sys.argv[2], int(sys.argv[3]))))
    elif mode == ["warm"]:
        print(json.dumps(times(sys.argv[2], rounds=1)))
    elif mode == ["times"]:
        print(json.dumps(times(sys.argv[2])))
    else:
        main()
