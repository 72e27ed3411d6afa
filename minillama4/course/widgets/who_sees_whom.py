"""Who sees whom: which earlier tokens one attention layer lets a token look at, in prefill and in decode.

The grid is not drawn from a formula. It asks the model's own `Attention` with its cache: all queries and keys are zero,
so that every key in sight weighs the same, and token j's value is a one in channel j. What then comes out at token i is
the list of whom it saw. Two kinds stand there for contrast: a sliding window, for which Llama 4's chunks are often
taken, and a local layer as Meta's reference code runs it, which masks chunks only when a call has more than one token.
"""

from dataclasses import replace

import ipywidgets
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from ...attention import Attention
from ...budget import pick
from ...cache import LayerCache
from ...config import Llama4Config, TextConfig
from .frame import ORANGE, RED, Shown, View

TOKENS = 24
KINDS = {
    "local: RoPE, one chunk": "local",
    "global: NoPE, everything": "global",
    "sliding window (not Llama 4)": "window",
    "local, in Meta's reference": "meta",
}
MODES = {"all at once (prefill)": "prefill", "one by one (decode)": "decode"}
LOCAL_LAYER, GLOBAL_LAYER = 0, 3  # of every preset: NoPE is 3, 7, 11, ...

LATER, HIDDEN, SEEN, CHOSEN, EXTRA = range(5)  # what a cell of the grid is
LOOKS = {  # -> colour and words
    HIDDEN: ("#dcdcdc", "earlier, but not seen"),
    SEEN: ("#8fbfdd", "seen"),
    CHOSEN: (ORANGE, "seen by the chosen token"),
    EXTRA: (RED, "seen in decode only"),
}


@torch.no_grad()
def sees(kind: str, chunk: int = 8, mode: str = "prefill", tokens: int = TOKENS) -> Tensor:
    """[queries, keys] bool: does query i see key j?

    kind: "local", "global", "window" or "meta". mode: "prefill" (all tokens in one call) or "decode" (each token in a
    call of its own, those before it in the cache). chunk: tokens of a chunk, or of the window. tokens: an even number.
    ValueError: another kind or mode, a chunk below 1, or tokens that are odd or below 2.
    """
    pick("kind", kind, dict.fromkeys(KINDS.values()))
    pick("mode", mode, dict.fromkeys(MODES.values()))
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 token")
    if tokens < 2 or tokens % 2:
        raise ValueError(f"tokens is {tokens}; it must be an even number of at least 2, one channel for each token")
    if kind == "window":  # the model has no such layer, so this one is its definition
        query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
        return (key <= query) & (key > query - chunk)
    text = replace(
        Llama4Config.preset("scout").text,
        hidden_size=tokens,
        num_heads=1,
        num_kv_heads=1,
        head_dim=tokens,
        # Meta's decode: a cache that keeps everything, and no mask for the single query.
        chunk_size=None if (kind, mode) == ("meta", "decode") else chunk,
    )
    return _outputs(text, GLOBAL_LAYER if kind == "global" else LOCAL_LAYER, mode) > 0


def _outputs(text: TextConfig, layer: int, mode: str) -> Tensor:
    """What each token gets from each other's value: [queries, keys], each row sums to 1."""
    tokens = text.hidden_size
    with torch.device("meta"):  # no weights are drawn: the random numbers of a notebook stay its own
        attention = Attention(text, layer)
    same, nothing = torch.eye(tokens), torch.zeros(tokens, tokens)
    matrices = dict(q_proj=nothing, k_proj=nothing, v_proj=same, o_proj=same)
    attention.load_state_dict({f"{name}.weight": matrix for name, matrix in matrices.items()}, assign=True)
    x = torch.eye(tokens)[None]  # [1, tokens, hidden]
    turn = torch.ones(tokens, 1, tokens // 2, dtype=torch.complex64)  # a zero stays zero, however it is turned
    if mode == "prefill":
        return attention(x, turn, None, None, 0, tokens)[0]
    cache = LayerCache(text, layer, 1, tokens, "cpu", torch.float32)
    steps = [attention(x[:, [i]], turn[[i]], None, cache, i, 1)[0] for i in range(tokens)]
    return torch.cat(steps)


def in_words(keys: list[int]) -> str:
    """[0, 1, 2, 5] -> "0 to 2, 5"."""
    runs = []
    for key in keys:
        if runs and key == runs[-1][1] + 1:
            runs[-1][1] = key
        else:
            runs.append([key, key])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)


def shown(kind: str = "local", chunk: int = 8, token: int = 8, mode: str = "prefill") -> Shown:
    """The grid of one kind of layer, and what one token of it sees. ValueError: as `sees`, or no such token."""
    seen = {each: sees(kind, chunk, each) for each in MODES.values()}
    now = pick("mode", mode, seen)
    if not 0 <= token < TOKENS:
        raise ValueError(f"token is {token}; tokens run from 0 to {TOKENS - 1}")
    keys = now[token].nonzero().flatten().tolist()
    counts = now.sum(1).tolist()
    what = "1 token: itself" if keys == [token] else f"{len(keys)} tokens: {in_words(keys)}"
    hidden = [key for key in range(token) if key not in keys]
    unseen = f"Earlier, but out of its sight: {in_words(hidden)}." if hidden else "Nothing earlier is hidden from it."
    text = (
        f"{_name(kind, chunk)}; the tokens come {_label(MODES, mode)}.\n"
        f"Token {token} sees {what}. {unseen}\n"
        f"Tokens seen by 0, 1, 2, ...: {' '.join(map(str, counts))}.\n"
        f"{_agreement(seen, token)}"
    )
    figure, side, bottom = Figure(figsize=(9, 4.7)), 3.7, 0.55  # inches; the grid is a square
    cells = _cells(now, seen["prefill"], token)
    _grid(figure.add_axes((0.07, bottom / 4.7, side / 9, side / 4.7)), cells, token)
    _counts(figure.add_axes((0.54, bottom / 4.7, side / 9, side / 4.7)), cells)
    present = [Patch(color=colour, label=words) for look, (colour, words) in LOOKS.items() if (cells == look).any()]
    figure.legend(handles=present, loc="upper center", ncols=4, frameon=False)
    alt = f"A grid of queries (rows) and keys (columns), each cell coloured if seen. {text}"
    return Shown(text, figure, alt.replace("\n", " "))


def _label(options: dict[str, str], value: str) -> str:
    return next(label for label, each in options.items() if each == value)


def _name(kind: str, chunk: int) -> str:
    return {
        "local": f"Local layer with RoPE, chunks of {chunk}",
        "global": "Global layer without RoPE (NoPE)",
        "window": f"Sliding window of {chunk}, which is not what Llama 4 does",
        "meta": f"Local layer with RoPE, chunks of {chunk}, as Meta's reference code runs it",
    }[kind]


def _agreement(seen: dict[str, Tensor], token: int) -> str:
    differ = (seen["prefill"] != seen["decode"]).any(1)
    if not differ.any():
        return "Prefill and decode agree: each token sees the same in both."
    counts = {mode: int(of[token].sum()) for mode, of in seen.items()}
    return (
        f"Prefill and decode disagree for {int(differ.sum())} of {TOKENS} tokens: token {token} sees "
        f"{counts['prefill']} in prefill and {counts['decode']} in decode."
    )


def _cells(now: Tensor, prefill: Tensor, token: int) -> Tensor:
    """[queries, keys]: which of `LOOKS` each cell has."""
    earlier = torch.ones_like(now).tril()
    cells = torch.where(now, SEEN, torch.where(earlier, HIDDEN, LATER))
    cells[token, now[token]] = CHOSEN
    return cells.masked_fill(now & ~prefill, EXTRA)


def _grid(axes: Axes, cells: Tensor, token: int):
    _squares(axes, cells)
    axes.add_patch(Rectangle((0, token), TOKENS, 1, fill=False, linewidth=1.8, clip_on=False, zorder=3))
    ticks = range(0, TOKENS, 4)
    axes.set(xlabel="may look at token", xticks=[tick + 0.5 for tick in ticks], xticklabels=ticks)
    axes.set(ylabel="token", yticks=[tick + 0.5 for tick in ticks], yticklabels=ticks)


def _counts(axes: Axes, cells: Tensor):
    """The cells of each row that it sees, pushed together: a sawtooth, a ramp, or a plateau."""
    seen = torch.where(cells > HIDDEN, cells, LATER)
    _squares(axes, seen.sort(dim=1, descending=True).values)
    axes.set(xlabel="how many it sees", xticks=range(0, TOKENS + 1, 4), yticks=[])


def _squares(axes: Axes, cells: Tensor):
    colours = ListedColormap(["white"] + [colour for colour, _ in LOOKS.values()])
    axes.imshow(cells.numpy(), cmap=colours, vmin=0, vmax=len(LOOKS), extent=(0, TOKENS, TOKENS, 0), aspect="auto")
    for lines in (axes.hlines, axes.vlines):
        lines(range(1, TOKENS), 0, TOKENS, color="white", linewidth=0.8)


class WhoSeesWhom(View):
    """Choose a layer, the size of its chunks, a token, and whether the tokens come together or one by one."""

    def __init__(self):
        controls = {
            "kind": ipywidgets.Dropdown(options=KINDS, description="layer"),
            "mode": ipywidgets.Dropdown(options=MODES, description="tokens come"),
            "chunk": ipywidgets.IntSlider(8, 1, TOKENS, description="chunk size", tooltip="or size of the window"),
            "token": ipywidgets.IntSlider(8, 0, TOKENS - 1, description="token"),
        }
        for control in controls.values():
            control.layout.width, control.style.description_width = "380px", "90px"
        super().__init__(shown, controls, ("kind mode", "chunk token"))

    def react(self, event):
        """A global layer has no chunks to size."""
        self.controls["chunk"].disabled = self.controls["kind"].value == "global"
