"""`plait bench train` on a GPU with one thing left out that makes its steps quicker.

python benchmarks/left_out.py nothing "((DF)3 AF)6" dim=1024 vocab=32000 --compile
python benchmarks/left_out.py swiglu "((DF)3 AF)6" dim=1024 vocab=32000 --compile

joined: the gradients of a projection's parts are put side by side by a copy (`plait.ops.parts`); else the compiler does it.
swiglu: SwiGLU's gradient is one kernel; else the compiler makes it of formulas.
strided: the convolution takes rows that lie apart; else the compiler copies them.
"""

import runpy
import sys
from importlib import import_module

from plait.ops import operator


def leave_out(what: str) -> None:
    if what == "strided":  # said where operators are made
        made = operator.operator
        operator.operator = lambda *args, strided=False, **options: made(*args, **options)
    import_module("plait.model")  # and all layers with it
    if what == "joined":
        for name, module in list(sys.modules.items()):
            if name.startswith("plait.layers.") and hasattr(module, "parts"):
                module.parts = lambda x, widths: x.split_with_sizes(list(widths), -1)  # type: ignore[attr-defined]
    if what == "swiglu":
        ops = import_module("plait.ops.swiglu")
        ops._swiglu = ops._gated(ops._silu, ops._silu_backward)


PARTS = ("nothing", "joined", "swiglu", "strided")


def main() -> None:
    what = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if what not in PARTS:
        sys.exit(f"say one of {', '.join(PARTS)}, then what plait bench train takes")
    leave_out(what)
    sys.argv[1:1] = ["bench", "train"]
    runpy.run_module("plait", run_name="__main__")


if __name__ == "__main__":
    main()
