"""`plait bench train` with the gradients of a projection's parts joined by a copy (`plait.ops.parts`), and as a plain split.

python benchmarks/joined_gradients.py joined "((DF)3 AF)6" dim=1024 vocab=32000 --compile
python benchmarks/joined_gradients.py split "((DF)3 AF)6" dim=1024 vocab=32000 --compile
"""

import runpy
import sys
from importlib import import_module


def main() -> None:
    form = sys.argv.pop(1)
    if form not in ("joined", "split"):
        sys.exit("say joined or split, then what plait bench train takes")
    import_module("plait.model")  # and all layers with it
    for name, module in list(sys.modules.items()):
        if form == "split" and name.startswith("plait.layers.") and hasattr(module, "parts"):
            module.parts = lambda x, widths: x.split_with_sizes(list(widths), -1)  # type: ignore[attr-defined]
    sys.argv[1:1] = ["bench", "train"]
    runpy.run_module("plait", run_name="__main__")


if __name__ == "__main__":
    main()
