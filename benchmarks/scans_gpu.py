"""Recurrences whose kernels walk or scan on a GPU (`scan`, `selective`), and mLSTM: errors of each form beside the chunked one
in float64, then times, forward and backward.

    python benchmarks/scans_gpu.py --out scans_gpu.json
"""

import argparse
import json
from pathlib import Path

import torch
from triton.testing import do_bench

from plait.evaluate.machine import machine
from plait.files import write_text
from plait.ops.kernels import forced
from plait.ops.mlstm import mlstm
from plait.ops.scan import scan
from plait.ops.selective import selective_scan

BOUNDS = {"scan": 2e-6, "selective": 1e-5, "mlstm": 1.5e-2}  # of the norm; mLSTM's inputs have 8 bits
WIDTHS = {  # (heads or none, keys or none, values or channels)
    "scan": [(None, None, 70), (None, None, 1024)],
    "selective": [(None, 16, 70), (None, 40, 512)],
    "mlstm": [(4, 64, 64), (3, 20, 40), (2, 128, 256)],
}
TIMED = {
    "scan": [(4, 4096, None, None, 1024), (1, 32_768, None, None, 1024)],
    "selective": [(4, 4096, None, 16, 2048)],
    "mlstm": [(24, 1024, 9, 64, 64), (4, 4096, 4, 128, 256)],
}
FORMS = {"scan": "tiles", "selective": "tokens", "mlstm": "chunks"}
SLOW = {"selective": 3}  # calls of the chunked form, which takes hundreds of launches


def inputs(op, b, t, heads, keys, width):
    generator = torch.Generator("cuda").manual_seed(t)

    def randn(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    if op == "scan":
        return [torch.sigmoid(randn(b, t, 1, 1, width) + 2), randn(b, t, 1, 1, width), randn(b, 1, 1, width)]
    if op == "selective":
        steps, rates = 0.1 * torch.sigmoid(randn(b, t, width)), -1 - 15 * torch.sigmoid(randn(width, keys))
        return [
            randn(b, t, width),
            steps,
            rates,
            *(randn(b, t, keys) for _ in "BC"),
            randn(b, width, keys),
        ]
    q, k, v = (randn(b, t, heads, n).bfloat16() for n in (keys, keys, width))
    return [q, k, v, randn(b, t, heads) - 1, randn(b, t, heads) + 3, randn(b, heads, width + 2, keys)]


def with_gradients(op, form, tensors):
    """Outputs, and the gradients of a fixed sum over them."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    *given, state = leaves
    scale = {"scale": given[0].shape[3] ** -0.5} if op == "mlstm" else {}
    with forced(f"{op}={form}"):
        y, *_ = {"scan": scan, "selective": selective_scan, "mlstm": mlstm}[op](*given, state=state, **scale)
    weights = torch.randn(y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    return [y.detach(), *torch.autograd.grad((y * weights.to(y.dtype)).sum(), leaves)]


def errors(op, widths):
    given = inputs(op, 2, 300, *widths)
    want = with_gradients(op, "chunked", [x.double() for x in given])
    found = {}
    for form in (FORMS[op], "chunked"):
        pairs = zip(with_gradients(op, form, given), want, strict=True)
        found[form] = max(((x.double() - y).norm() / y.norm()).item() for x, y in pairs)
    return {"op": op, "widths": widths, "worst": found}


def times(op, shape):
    given, found = inputs(op, *shape), {}
    for form in (FORMS[op], "chunked"):

        def call(form=form):
            return with_gradients(op, form, given)

        calls = {"warmup": 1, "rep": SLOW[op]} if form == "chunked" and op in SLOW else {"warmup": 50, "rep": 300}
        found[form] = do_bench(call, **calls, return_mode="median")
    return {"op": op, "shape": shape, "ms": found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="a JSON file for all numbers")
    out = parser.parse_args().out
    found = {"device": torch.cuda.get_device_name(), "machine": machine(), "errors": [], "times": []}
    for op in FORMS:
        for widths in WIDTHS[op]:
            found["errors"].append(errors(op, widths))
            print(found["errors"][-1], flush=True)
        for shape in TIMED[op]:
            found["times"].append(times(op, shape))
            print(found["times"][-1], flush=True)
        if out:
            write_text(Path(out), json.dumps(found, indent=1) + "\n")
    wrong = [row for row in found["errors"] if not row["worst"][FORMS[row["op"]]] <= BOUNDS[row["op"]]]
    raise SystemExit(f"beyond its bound: {wrong}" if wrong else 0)


if __name__ == "__main__":
    main()
