"""Pictures for lessons, drawn on private figures, each with its words (alt text)."""

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..config import Llama4Config, TextConfig
from ..trace import Trace
from .widgets.frame import BLUE, ORANGE, Shown

LOCAL, GLOBAL = "#bcd9ea", BLUE


def layer_map(*names: str) -> Shown:
    """One row a preset, one box a layer: which layers see everything, and which hold experts."""
    figure = Figure(figsize=(10, 0.75 * len(names) + 0.9), layout="constrained")
    axes, words = figure.subplots(), []
    for row, name in enumerate(names):
        config = Llama4Config.preset(name)
        text = config.text
        width = 48 / text.num_layers  # all rows are equally long
        for layer in range(text.num_layers):
            colour = LOCAL if text.is_local(layer) else GLOBAL
            axes.broken_barh([(layer * width, 0.92 * width)], (row - 0.32, 0.64), facecolors=colour)
            if text.is_moe(layer):
                axes.plot((layer + 0.46) * width, row, "o", color=ORANGE, markersize=5, markeredgecolor="black")
        words.append(
            f"{name}: {text.num_layers} layers, {len(text.nope_layers)} of them without rotary embedding and over the "
            f"whole context, experts in {len(text.moe_layers)}" + (f" ({config.note})" if config.note else "")
        )
    axes.set(yticks=range(len(names)), yticklabels=names, xticks=[], ylim=(len(names) - 0.5, -0.5), xlim=(-0.2, 48))
    axes.set_xlabel("layers, first to last")
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    handles = [
        Patch(color=LOCAL, label="RoPE, inside a chunk"),
        Patch(color=GLOBAL, label="NoPE, whole context"),
        axes.plot([], [], "o", color=ORANGE, markeredgecolor="black", label="mixture of experts")[0],
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return Shown("\n".join(words), figure, f"Layers as boxes in a row. {'; '.join(words)}.")


def attention_maps(seen: Trace, config: TextConfig) -> Shown:
    """A square a traced layer: row = the token that looks, column = the token it looks at, mean over heads."""
    layers = sorted(seen.attention)
    figure = Figure(figsize=(4.4 * len(layers), 4.6), layout="constrained")
    words = []
    for axes, layer in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        paid = seen.attention[layer][0].detach().mean(0)  # [queries, keys]
        drawn = axes.imshow(paid.sqrt(), cmap="Blues", vmin=0, vmax=1)  # the root: most probabilities are small
        sees = f"its own chunk of {config.chunk_size}" if config.is_local(layer) else "everything before it"
        axes.set(title=f"layer {layer}: {sees}", xlabel="looks at token", ylabel="token")
        words.append(f"in layer {layer} each token sees {sees}")
    bar = figure.colorbar(drawn, ax=figure.axes, shrink=0.7, label="attention")
    bar.set_ticks([0, 0.5**0.5, 1], labels=["0", "0.5", "1"])
    return Shown("\n".join(words), figure, f"Attention from token to token: {'; '.join(words)}.")
