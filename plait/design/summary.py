"""A design as text: what `print(model)` and `plait show` say."""

from itertools import groupby

from plait.design import count
from plait.design.model import ModelConfig

CONTEXTS = (4_096, 131_072)


def si(value: float) -> str:
    """1234567 -> "1.23M"."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


def size(count_bytes: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count_bytes < 1024:
            return f"{count_bytes:.4g} {unit}"
        count_bytes /= 1024
    return f"{count_bytes:.4g} TiB"


def counted(design: ModelConfig) -> str:
    """How many, and where a token passes some experts only, how many it passes."""
    all_, active = count.parameters(design), count.active_parameters(design)
    return si(all_) if active == all_ else f"{si(all_)} ({si(active)} active)"


def summary(design: ModelConfig) -> str:
    """One line per run of equal slots, then the totals."""
    rows = count.slot_counts(design, CONTEXTS[0])
    lines = [f"plait model {design.pattern!r}: dim {design.dim}, vocabulary {design.vocab}"]
    for (layer, parameters), group in groupby(rows, key=lambda row: (row.layer, row.parameters)):
        slots = list(group)
        names = slots[0].address if len(slots) == 1 else f"{slots[0].address} .. {slots[-1].address}"
        lines.append(f"  {names:<14} {layer:<28} {si(parameters)} parameters")
    lines.append(f"  {counted(design)} parameters in all")
    for context in CONTEXTS:
        flops, state = count.flops_per_token(design, context), count.state_bytes(design, context)
        lines.append(f"  at {context:>7,} tokens: {si(flops)}FLOP per token forward, {size(state)} of state")
    return "\n".join(lines)
