"""Kernels with a decay per key channel on a GPU: right beside float64 loops, then timed.

python benchmarks/channels_gpu.py                  all of it, a subprocess per configuration
python benchmarks/channels_gpu.py right OP K V DT  one configuration's checks
python benchmarks/channels_gpu.py warm OP KERNEL I one variant's compilation and check at the timed widths
python benchmarks/channels_gpu.py time OP JSON     time variants that came through
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
WITHIN = {"bf16": 1.5e-2, "fp16": 3e-3, "fp32": 5e-5}
RIGHT = [  # the slowest to compile first
    ("kda", 128, 128, "fp32"), ("gla", 128, 128, "fp32"), ("kda", 64, 64, "fp32"), ("gla", 64, 64, "fp32"),
    *[(op, K, V, "bf16") for op in ("gla", "kda") for K, V in ((64, 64), (128, 128), (256, 256), (48, 80))],
    ("gla", 128, 128, "fp16"), ("kda", 128, 128, "fp16"),
]  # fmt: skip
LOOPS = [{"BV": v, "num_warps": w, "num_stages": s} for v, w, s in (
    (64, 4, 2), (64, 4, 1), (64, 8, 1), (64, 8, 2), (64, 4, 3), (128, 8, 1), (128, 8, 2),
)]  # fmt: skip
VARIANTS = {
    "prepare": [{"BK": k, "num_warps": w, "num_stages": 1} for k, w in ((64, 8), (64, 4), (128, 8), (128, 4))],
    "forward": LOOPS,
    "backward": LOOPS,
    "gradients": [{"BK": k, "BV": v, "num_warps": w, "num_stages": s} for k, v, w, s in (
        (64, 64, 8, 1), (64, 64, 8, 2), (64, 64, 4, 1), (64, 128, 8, 1), (128, 64, 8, 1), (128, 64, 16, 1),
    )],
}  # fmt: skip


def main():
    started = time.time()
    workers = int(os.environ.get("WORKERS", max(2, (os.cpu_count() or 2) - 2)))

    def call(args):
        began = time.time()
        done = subprocess.run([sys.executable, __file__, *map(str, args)], capture_output=True, encoding="utf-8")
        return args, done.returncode, done.stdout.strip(), done.stderr.strip().splitlines()[-1:], time.time() - began

    jobs = [("right", *x) for x in RIGHT]
    jobs += [
        ("warm", op, name, i) for op in ("kda", "gla") for name, many in VARIANTS.items() for i in range(len(many))
    ]
    passed = {op: {name: [] for name in VARIANTS} for op in ("kda", "gla")}
    print(f"1. right? relative error of the worst of all cases (bounds {WITHIN})\n")
    print(f"{'op K V kind':22}   o      state  dq     dk     dv     dg     dbeta  dstate")
    with ThreadPoolExecutor(workers) as pool:
        for args, code, out, err, took in pool.map(call, jobs):
            if args[0] == "right":
                print(
                    f"{' '.join(map(str, args[1:])):22} {out if out else 'FAILED'} {'' if code == 0 else err} ({took:.0f} s)",
                    flush=True,
                )
            elif code == 0:
                passed[args[1]][args[2]].append(args[3])
            else:
                print(f"left out: {args[1]} {args[2]} {VARIANTS[args[2]][args[3]]}: {out[-200:]} {err}", flush=True)
    print(f"\n2. times at B 8, T 4096, H 16, K = V = 128, bf16 ({time.time() - started:.0f} s so far)\n", flush=True)
    for op in ("kda", "gla"):
        args, code, out, err, took = call(("time", op, json.dumps(passed[op])))
        print(out, "" if code == 0 else err, f"({took:.0f} s)\n", flush=True)
    print(f"{time.time() - started:.0f} s in all")


def inputs(op, b, t, K, V, dtype, device, gates, heads=4):
    import torch

    generator = torch.Generator(device).manual_seed(t + K)

    def randn(*shape):
        return torch.randn(*shape, device=device, generator=generator)

    groups = heads // 2 if op == "kda" else heads
    q, k = randn(b, t, groups, 2 * K).chunk(2, 3)
    k, v = k / k.norm(dim=-1, keepdim=True), randn(b, t, heads, V)
    u = torch.rand(b, t, heads, K, device=device, generator=generator)
    g = {"gentle": -0.05 * u, "mixed": -20 * u**6, "300": -9.4 * u, "none": 0 * u, "strong": -1e3 * u}[gates]
    if gates == "mixed":
        g[:, 1::5] = -1e-4
    beta = 2 * torch.rand(b, t, heads, device=device, generator=generator)
    return [x.to(dtype) for x in (q, k, v)] + [g] + ([beta] if op == "kda" else [])


def with_gradients(run, tensors):
    import torch

    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    outputs = [x for x in run(*leaves) if x is not None]
    generator = torch.Generator().manual_seed(3)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)).sum()
        for x in outputs
    )
    return [*(x.detach() for x in outputs), *torch.autograd.grad(loss, leaves)]


def truth(op, given, packing, has_state, scale):
    from plait.ops.delta import gated_delta
    from plait.ops.gla import gla
    from plait.ops.kernels import forced

    def run(*x):
        state = x[-1] if has_state else None
        with forced("reference"):
            return (gated_delta if op == "kda" else gla)(
                *x[: len(x) - has_state], state=state, packing=packing, scale=scale
            )[:2]

    return with_gradients(run, [x.double() for x in given])


def right(op, K, V, kind):
    import torch

    from plait.ops import channels_gpu
    from plait.ops.packing import Packing

    device, K, V, dtype, worst, problems = torch.device("cuda"), int(K), int(V), getattr(torch, DTYPES[kind]), {}, []
    heads = 4 if K <= 128 else 2  # of which float64 loops keep every state
    cases = [("none", (1,), 2), ("gentle", (63,), 2), ("mixed", (200,), 2), ("300", (1024,), 1), ("strong", (200,), 1)]
    cases += [("mixed", (1, 66, 64, 5, 130), 1), ("300", (63, 1, 200), 1)]
    for gates, lengths, b in cases:
        given = inputs(op, b, sum(lengths), K, V, dtype, device, gates, heads)
        packing = Packing.of_lengths(lengths, device) if len(lengths) > 1 else None
        given.append(torch.randn(b if packing is None else len(lengths), heads, V, K, device=device) / 4)

        def run(*x, packing=packing):
            return channels_gpu.run(*x[:-1], state=x[-1], packing=packing, scale=K**-0.5)

        one, again = with_gradients(run, given), with_gradients(run, given)
        names = ["o", "state", "dq", "dk", "dv", "dg", *(["dbeta"] if op == "kda" else []), "dstate"]
        for name, x, y, z in zip(names, one, again, truth(op, given, packing, True, K**-0.5), strict=True):
            floor = 1e-3 * (given[2].double().norm() if name != "dg" else z.new_tensor(1.0))
            error = float((x.double() - z).norm() / z.norm().clamp_min(floor))
            error = error if x.isfinite().all() else float("inf")
            worst[name] = max(worst.get(name, 0.0), error)
            if error > WITHIN[kind]:
                problems.append(f"{name} {gates} {lengths}: {error:.1e}")
            if not torch.equal(x, y):
                problems.append(f"{name} {gates} {lengths}: two runs differ")
    print(
        "  ".join(
            f"{worst[name]:.0e}" if name in worst else "  -  "
            for name in ("o", "state", "dq", "dk", "dv", "dg", "dbeta", "dstate")
        )
    )
    if problems:
        print(f"{len(problems)} PROBLEMS: " + "; ".join(problems[:6]))
        sys.exit(1)
    print("ok")


def warm(op, name, i):
    import torch

    from plait.ops import channels_gpu, channels_triton

    given = inputs(op, 2, 300, 128, 128, torch.bfloat16, "cuda", "mixed", heads=16)
    given[1] = given[1] if op == "gla" else given[1].repeat_interleave(2, 2)
    given[0] = given[0] if op == "gla" else given[0].repeat_interleave(2, 2)
    channels_triton.OPTIONS[name] = VARIANTS[name][int(i)]
    got = with_gradients(lambda *x: channels_gpu.run(*x, state=None, packing=None, scale=0.1), given)
    for j, (x, z) in enumerate(zip(got, truth(op, given, None, False, 0.1), strict=True)):
        error = float((x.double() - z).norm() / z.norm())
        if not error < WITHIN["bf16"]:
            print(f"number {j} is off by {error:.1e}")
            sys.exit(1)


def clocked(run, times=6):
    import torch

    for _ in range(2):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False))[times // 2]


def timed(op, passed):
    import torch

    from plait.ops import channels_gpu, channels_triton, chunks_gpu

    print(torch.cuda.get_device_name(), op)
    given = inputs(op, 8, 4096, 128, 128, torch.bfloat16, "cuda", "gentle", heads=16)
    if op == "kda":
        given[0], given[1] = (x.repeat_interleave(2, 2) for x in given[:2])
    leaves, do = [x.requires_grad_() for x in given], torch.randn_like(given[2])
    launch, seen = channels_triton.launch, {}

    def watched(kernel, *args, **constants):
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        launch(kernel, *args, **constants)
        pair[1].record()
        seen.setdefault(kernel.fn.__name__, []).append(pair)

    def both(run=channels_gpu.run, leaves=leaves):
        o = run(*leaves, state=None, packing=None)[0]
        torch.autograd.grad(o, leaves, do[: len(leaves[0])] if o.ndim == 4 else do)

    def each(times=6):
        channels_triton.launch = watched
        for _ in range(2):
            both()
        seen.clear()
        for _ in range(times):
            both()
        channels_triton.launch = launch
        torch.cuda.synchronize()
        found = {}
        for name, pairs in seen.items():
            found[name] = round(sum(a.elapsed_time(b) for a, b in pairs) / times, 3)  # prepare runs twice in each
        return found

    start, best = dict(channels_triton.OPTIONS), {}
    for name, indices in passed.items():
        for i in indices:
            options = VARIANTS[name][i]
            channels_triton.OPTIONS[name] = options
            try:
                ms = each()[name]
            except Exception as error:
                print(f"{name:10} {options} {type(error).__name__} {str(error)[:80]}")
                continue
            print(f"{name:10} {ms:7.3f} ms  {' '.join(f'{k} {v}' for k, v in options.items())}", flush=True)
            best[name] = min(best.get(name, (ms, options)), (ms, options), key=lambda x: x[0])
        channels_triton.OPTIONS[name] = start[name]
    for label, options in (("as set", start), ("best of each", {name: found[1] for name, found in best.items()})):
        channels_triton.OPTIONS.update(options)
        with torch.no_grad():
            forward = clocked(lambda: channels_gpu.run(*leaves, state=None, packing=None))
        print(f"{label:13} forward {forward:7.3f} ms   forward and backward {clocked(both):7.3f} ms   {each()}")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    print(f"peak memory above the inputs {(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GiB")

    from plait.ops.delta import gated_delta
    from plait.ops.gla import gla
    from plait.ops.kernels import forced

    few = [x[:2].detach().requires_grad_() for x in leaves]

    def torchs(*x, **call):
        with forced("chunked"):
            return (gated_delta if op == "kda" else gla)(*x)[:1]

    try:
        print(f"in torch      forward and backward {4 * clocked(lambda: both(torchs, few), 3):7.3f} ms (4 times B 2)")
    except Exception as error:
        print("in torch", type(error).__name__, str(error)[:80])
    scalar = [*leaves[:3], leaves[3].detach().mean(3).requires_grad_(), *leaves[4:]]
    with torch.no_grad():
        forward = clocked(lambda: chunks_gpu.run(*scalar, state=None, packing=None))
    print(
        f"one decay     forward {forward:7.3f} ms   "
        f"forward and backward {clocked(lambda: both(chunks_gpu.run, scalar)):7.3f} ms"
    )


if __name__ == "__main__":
    mode = sys.argv[1:2]
    if mode == ["right"]:
        right(*sys.argv[2:])
    elif mode == ["warm"]:
        warm(*sys.argv[2:])
    elif mode == ["time"]:
        timed(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
