"""Attention to attention: a window, a prefix, sinks, a gate, with the very weights. The control of every conversion."""

from plait.convert.transfer.parts import matrix
from plait.layers.attention import AttentionLayer
from plait.layers.declared import Projection

SINK = -4.0  # a logit that takes next to nothing of the softmax, but has a gradient


def to_attention(old: AttentionLayer, new: AttentionLayer) -> None:
    """All weights, a shared layer's with the additions of this use. A gate that is new starts half open, with outputs twice as
    large; sinks that are new start near nothing; norms of q and k that are new change the layer."""
    theirs, gate = dict(old.named_parameters()), new.config.output_gate and not old.config.output_gate
    theirs |= {
        f"{name}.weight": matrix(module) for name, module in old.named_modules() if isinstance(module, Projection)
    }
    for name, parameter in new.named_parameters():
        if name == "sinks" and old.sinks is None:
            parameter.data.fill_(SINK)
        elif name in theirs and theirs[name].shape == parameter.shape:
            parameter.data.copy_(theirs[name])
    if not gate:
        return
    width = sum(old.config.rows().values())
    weight, bias = new.qkv_proj.weight.data, new.qkv_proj.bias
    weight[:width], weight[width:] = theirs["qkv_proj.weight"], 0
    if bias is not None and old.qkv_proj.bias is not None:
        bias.data[: len(old.qkv_proj.bias)] = old.qkv_proj.bias.data
    output = getattr(new, new.projection)
    if output is not None:
        output.weight.data.mul_(2)
