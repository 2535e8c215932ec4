"""Chunked recurrences on a GPU, plait's kernels and flash-linear-attention's: errors beside float64 loops, then times.

python benchmarks/ops_gpu.py --out FILE     all of it, every op in a subprocess of its own, which a broken kernel may kill
python benchmarks/ops_gpu.py errors OP K    one op's errors, K = V
python benchmarks/ops_gpu.py warm OP I N    compiles the I-th of N parts of what fla tunes over
python benchmarks/ops_gpu.py times OP       one op's times

flash-linear-attention refuses gated gradients with some versions of Triton. Where it does, its guard is switched off here, and
a * says so: those numbers are then of kernels that their authors hold to be wrong there. Its times are of tuned kernels, its
errors of its first configurations, and "apart" is how far its timed results are from those of plait.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
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
LIMIT = 90  # seconds of one subprocess
PARTS = {"gla": 7, "ssd": 4, "kda": 4, "delta": 2}  # in which fla's many configurations are compiled, side by side


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", help="a JSON file for all numbers")
    out, started = parser.parse_args().out, time.time()
    found = {"warm": [], "errors": [], "times": [], "failed": []}
    jobs = [("warm", op, part, parts) for op, parts in PARTS.items() for part in range(parts)]
    jobs += [("errors", op, size) for size in SIZES for op in OPS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(_subprocess, jobs))
    print(f"errors and compilation: {time.time() - started:.0f} s", flush=True)
    for job in [("times", op) for op in OPS]:  # one after the other
        done.append(_subprocess(job))
    for job, rows, error in done:
        found[job[0]] += rows
        if error:
            found["failed"].append({"job": " ".join(map(str, job)), "error": error})
    found["seconds"] = round(time.time() - started)
    show(found)
    if out:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    wrong = [row for row in found["errors"] if row["form"] == "chunks" and not row["worst"] <= BOUND]
    sys.exit(1 if wrong or any(not row["job"].startswith("warm") for row in found["failed"]) else 0)


def _subprocess(job):
    """(job, rows that it found, None or why no more)."""
    choices = {} if job[0] == "times" else {"FLA_CACHE_RESULTS": "0"}  # to be kept, made where nothing else runs
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        command = [sys.executable, __file__, *map(str, job)]
        try:
            code = subprocess.run(command, stdout=out, stderr=err, env=os.environ | choices, timeout=LIMIT).returncode
        except subprocess.TimeoutExpired:
            code = f"took longer than {LIMIT} s"
        out.seek(0), err.seek(0)
        rows = [json.loads(line) for line in out if line.startswith("{")]
        return job, rows, f"{code}: {' | '.join(err.read().strip().splitlines()[-3:])[-400:]}" if code else None


def show(found):
    print("\nrelative errors, B 2, T 300 (and packed), H 4, bf16, with states; * with fla's guard off\n")
    print(f"{'op':6}{'K=V':>5}  {'gates':7} {'form':8}" + "".join(f"{name:>9}" for name in NAMES))
    for row in found["errors"]:
        cells = "".join(f"{row[name]:9.1e}" if name in row else f"{'-':>9}" for name in NAMES)
        form = row["form"] + ("*" if row["guard_off"] else "")
        print(f"{row['op']:6}{row['K']:5}  {row['gates']:7} {form:8}{cells}")
    print(f"\nmilliseconds at B {B}, T {T}, H {H}, K = V = {K}, bf16, medians of 10\n")
    print(f"{'op':6} {'form':8}{'forward':>9}{'and backward':>14}{'apart':>9}")
    for row in found["times"]:
        form = row["form"] + ("*" if row["guard_off"] else "")
        apart = f"{row['apart']:9.1e}" if "apart" in row else ""
        print(f"{row['op']:6} {form:8}{row['forward_ms']:9.2f}{row['both_ms']:14.2f}{apart}")
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


def tune(part, parts, milliseconds):
    """Triton's tuner takes every `parts`-th configuration from `part` on, and so long to time one."""
    from functools import partial

    import triton.testing
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs
    triton.testing.do_bench = partial(triton.testing.do_bench, warmup=1, rep=milliseconds)

    def pruned(self, kwargs):
        configs = prune(self, kwargs)
        return configs[part::parts] or configs[:1]

    Autotuner.prune_configs = pruned


def refused(op):
    """Whether plait's form "fla" refuses gradients here."""
    import torch

    from plait.ops import fla
    from plait.ops.kernels import Call

    fits = {"ssd": fla.fits_ssd, "delta": fla.fits_delta}.get(op, fla.fits_channels)
    call = Call("cuda", torch.bfloat16, "many", gradients=True, architecture=torch.cuda.get_device_capability())
    assert fits(call._replace(gradients=False)) is None, fits(call._replace(gradients=False))
    return fits(call) is not None


def check_refusal(op, size):
    """That flash-linear-attention itself refuses gradients where plait says so, and only there."""
    from unittest.mock import patch

    import torch

    from plait.ops import fla

    leaves = [x.requires_grad_() for x in inputs(op, 1, 128, 4, size, "gentle")]
    with patch.object(fla, "_gradients", lambda call, op: None):
        y = run(op, "fla", *leaves)[0]
    try:
        torch.autograd.grad(y.sum(), leaves)
        its = None
    except RuntimeError as error:
        its = str(error)
    if refused(op) != (its is not None):
        raise SystemExit(f"plait says {refused(op)} where fla says {its}")


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

    check_refusal(op, size)
    off = refused(op)
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
                with guard_off():
                    got = with_gradients(lambda *x, call=call, form=form: call(form, *x), given)
                for name, x, z in zip(names, got, truth, strict=True):
                    error = float((x.double() - z).norm() / z.norm()) if x.isfinite().all() else float("inf")
                    row[name] = max(row.get(name, 0.0), error)
            row["worst"] = max(row[name] for name in names)
            print(json.dumps(row), flush=True)


def warm(op):
    import torch

    leaves = [x.requires_grad_() for x in inputs(op, 1, T, H, K, "gentle")]
    for form in FORMS:
        with guard_off():
            torch.autograd.grad(run(op, form, *leaves)[0].sum(), leaves)
    torch.cuda.synchronize()


def times(op, rounds=10):
    import torch

    first, off = None, refused(op)
    leaves = [x.requires_grad_() for x in inputs(op, B, T, H, K, "gentle")]
    do = torch.randn_like(leaves[2])
    versions = f"torch {torch.__version__}, Triton {_version('triton')}, fla {_version('flash-linear-attention')}"
    for form in FORMS:
        row = {"op": op, "form": form, "guard_off": form == "fla" and off}
        row["machine"] = f"{torch.cuda.get_device_name()}, {versions}"

        def forward(form=form):
            with torch.no_grad():
                run(op, form, *leaves)

        def both(form=form):
            y = run(op, form, *leaves)[0]
            return y, *torch.autograd.grad(y, leaves, do)

        row["forward_ms"] = clocked(forward, rounds)
        torch.cuda.empty_cache()
        with guard_off():
            row["both_ms"] = clocked(both, rounds)
            results = both()
        if first is None:
            first = results
        else:
            row["apart"] = max(
                float((x - z).detach().float().norm() / z.detach().float().norm())
                for x, z in zip(results, first, strict=True)
            )
        print(json.dumps(row), flush=True)


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
        tune(0, 1000, 1)
        errors(sys.argv[2], int(sys.argv[3]))
    elif mode == ["warm"]:
        tune(int(sys.argv[3]), int(sys.argv[4]), 1)
        warm(sys.argv[2])
    elif mode == ["times"]:
        tune(0, 1, 20)
        times(sys.argv[2])
    else:
        main()
