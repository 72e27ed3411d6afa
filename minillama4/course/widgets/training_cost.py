"""Training-cost calculator: what one step of Scout or Maverick costs if all of it trains, or only some of its parts.

FLOPs and the memory of weights, gradients and optimizer are those of `minillama4.train_cost`. Activations are added
here, with checkpointing: kept are the inputs of each layer that the gradient passes (bf16), those of a trained
projector, and the logits, once, in fp32. All else is computed again, one layer at a time, which the FLOPs leave out.
"""

from dataclasses import dataclass

import ipywidgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ...budget import pick
from ...config import Llama4Config
from ...fusion import image_prompt
from ...roofline import GPUS
from ...train_cost import PARTS, Cost, training_cost
from .cost_calculator import LIGHT, NAMES, cards
from .frame import BLUE, GREEN, ORANGE, PURPLE, RED, Shown, View

PRESETS = {NAMES[key]: key for key in ("scout", "maverick")}
WAYS = {  # what trains -> the parts
    "everything, jointly": PARTS,
    "encoder frozen": ("projector", "text"),
    "text frozen": ("encoder", "projector"),
    "projector only": ("projector",),
}
JOINT = next(iter(WAYS))
OPTIMIZERS = {  # -> bytes for each trained parameter
    "AdamW: fp32 weight, 2 moments (12 bytes)": 12,
    "Muon or momentum: fp32 weight, 1 moment (8 bytes)": 8,
    "AdamW with 8-bit moments (6 bytes)": 6,
    "plain SGD: nothing (0 bytes)": 0,
}
GRID_TILES = tuple(range(1, 17))
FLOPS = {  # in pictures and tables -> of a `Cost`, and how a bar looks; the hatch tells parts apart without colours
    "forward": ("forward", dict(color=LIGHT)),
    "backward, inputs": ("backward_inputs", dict(color=BLUE, hatch="///")),
    "backward, weights": ("backward_weights", dict(color=ORANGE)),
}
BYTES = {
    "weights": ("weights", dict(color=LIGHT)),
    "gradients": ("gradients", dict(color=GREEN, hatch="///")),
    "optimizer": ("states", dict(color=RED)),
    "activations": ("activations", dict(color=PURPLE, hatch="...")),
}


# ----------------------------------------------------------------------------------------------------------------------
# Costs


@dataclass(frozen=True)
class Load:
    """What one step is fed."""

    text: int = 1000  # tokens of text in a sequence
    pictures: int = 1  # in a sequence
    grid: int = 4  # tiles of a picture's grid, 1 to 16; with more than one, a global tile comes on top
    batch: int = 1  # sequences

    @property
    def tiles(self) -> int:
        return self.pictures * (self.grid + (self.grid > 1))

    @property
    def picture_tokens(self) -> int:
        """Of one picture, the marks around its patches included. They do not depend on the grid's proportions."""
        return len(image_prompt(1, self.grid, Llama4Config.preset("scout").vision.tokens_per_tile))

    @property
    def tokens(self) -> int:
        return self.text + self.pictures * self.picture_tokens


@dataclass(frozen=True)
class Step:
    """One training step: FLOPs by part, bytes by purpose ("weights", "gradients", "states", "activations")."""

    cost: Cost
    memory: dict[str, float]

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def h100s(self) -> int:
        """Cards that hold all of it between them, shared out evenly."""
        return cards(self.bytes, "h100")


def step(preset: str = "scout", way: str = JOINT, load: Load = Load(), states: float = 12) -> Step:
    """way: a key of `WAYS`. states: bytes of the optimizer for each trained parameter. ValueError: a bad value."""
    pick("model", preset, dict.fromkeys(PRESETS.values()))
    trained = pick("way of training", way, WAYS)
    for name, least, most in (("text", 1, None), ("pictures", 0, None), ("grid", 1, GRID_TILES[-1])):
        value = getattr(load, name)
        if value < least or (most and value > most):
            raise ValueError(f"{name} is {value}; it must be at least {least}{f' and at most {most}' if most else ''}")
    cost = training_cost(preset, load.tokens, load.tiles, trained, batch=load.batch)
    return Step(
        cost, cost.memory(states=states) | {"activations": activations(Llama4Config.preset(preset), load, cost)}
    )


def activations(config: Llama4Config, load: Load, cost: Cost) -> int:
    """Bytes kept from the forward pass for the backward pass of `cost`, all sequences together."""
    text, vision = config.text, config.vision
    kept = 0
    if cost.text.backward:
        kept += load.tokens * (2 * text.num_layers * text.hidden_size + 4 * text.vocab_size)
    if cost.projector.backward_weights:
        kept += 2 * load.tiles * vision.tokens_per_tile * vision.adapter_width
    if cost.encoder.backward:
        kept += 2 * load.tiles * (vision.patches_per_side**2 + 1) * vision.num_layers * vision.hidden_size
    return load.batch * kept


# ----------------------------------------------------------------------------------------------------------------------
# Words and picture


def shown(preset: str = "scout", way: str = JOINT, load: Load = Load(), states: float = 12) -> Shown:
    """All ways of training beside each other, the chosen one in words. Arguments and errors as of `step`."""
    now = step(preset, way, load, states)
    steps = {each: step(preset, each, load, states) for each in WAYS}
    cost, total = now.cost, steps[JOINT].cost.total
    parts = "; ".join(
        f"{name} {flops(part.forward)} forward, {flops(part.backward)} backward" for name, part in cost.parts().items()
    )
    memory = ", ".join(f"{label} {size(now.memory[key])}" for label, (key, _) in BYTES.items())
    lines = [
        f"{NAMES[preset]}, {way}: {cost.trained_parameters:,} of {cost.parameters:,} parameters train.",
        f"A step: {_times(load.batch, 'sequence')} of {load.tokens:,} tokens: {load.text:,} of text and {_fed(load)}.",
        f"FLOPs: forward {flops(cost.forward)}, backward {flops(cost.backward)}; together {flops(cost.total)}, "
        f"{cost.total / total:.0%} of training jointly, at least {cost.total / GPUS['h100'].flops:,.2f} seconds of one "
        "H100.",
        f"By part: {parts}.",
        f"Memory: {memory}; together {size(now.bytes)}, which {_times(now.h100s, 'H100')} can hold.",
        *_lesson(way, now),
        "Assumed: bf16 weights and gradients; every token reaches the head; layers computed again in the backward pass "
        "(nearly one forward pass more, not counted); all shared out evenly, with "
        f"{GPUS['h100'].reserve / 1e9:g} GB of each card kept free; experts all in memory, chosen ones computed.",
    ]
    figure = Figure(figsize=(9, 2.7))
    sides = figure.add_axes((0.015, 0.11, 0.47, 0.79)), figure.add_axes((0.515, 0.11, 0.47, 0.79))
    costs = {each: [getattr(s.cost, key) for key, _ in FLOPS.values()] for each, s in steps.items()}
    ends = {each: f"{flops(s.cost.total)}, {s.cost.total / total:.0%} of joint" for each, s in steps.items()}
    _bars(sides[0], costs, FLOPS, ends, "FLOPs", way)
    costs = {each: [s.memory[key] for key, _ in BYTES.values()] for each, s in steps.items()}
    ends = {each: f"{size(s.bytes)}, {_times(s.h100s, 'H100')}" for each, s in steps.items()}
    _bars(sides[1], costs, BYTES, ends, "B", way)
    compared = "; ".join(f"{each} {row[4]} of the FLOPs, {row[-1]} H100s" for each, row in _rows(steps).items())
    return Shown("\n".join(lines), figure, f"Bars: FLOPs and memory of four ways to train. {compared}. {lines[0]}")


def table(preset: str = "scout", load: Load = Load(), states: float = 12) -> list[list[str]]:
    """Lines of cells, a heading first, then one for each way of training: FLOPs, then memory, then cards."""
    heading = ["trains", *(f"{label}, FLOPs" for label in FLOPS), "of joint", *BYTES, "H100s"]
    return [heading, *_rows({each: step(preset, each, load, states) for each in WAYS}).values()]


def _rows(steps: dict[str, Step]) -> dict[str, list[str]]:
    total = steps[JOINT].cost.total
    return {
        way: [
            way,
            *(flops(getattr(each.cost, key)) for key, _ in FLOPS.values()),
            f"{each.cost.total / total:.0%}",
            *(size(each.memory[key]) for key, _ in BYTES.values()),
            f"{each.h100s:,}",
        ]
        for way, each in steps.items()
    }


def table_tag(lines: list[list[str]], chosen: str) -> str:
    """For HTML, as a table that a screen reader reads too; the line that begins with `chosen` is bold."""
    (first, *others), *rows = lines
    left, right = ("text-align: left", "text-align: right; padding: 1px 9px")
    lines = [
        f'<th scope="col" style="{left}">{first}</th>',
        *(f'<th scope="col" style="{right}">{w}</th>' for w in others),
    ]
    html = f"<tr>{''.join(lines)}</tr>"
    for way, *cells in rows:
        weight = "font-weight: bold" if way == chosen else "font-weight: normal"
        html += f'<tr style="{weight}"><th scope="row" style="{left}; {weight}">{way}</th>'
        html += "".join(f'<td style="{right}">{words}</td>' for words in cells) + "</tr>"
    return f'<table style="font-size: 90%; line-height: 1.4">{html}</table>'


def flops(number: float) -> str:
    """Three digits: "56.6 T"."""
    scale, unit = _unit(number, "FLOPs")
    return f"{number / scale:.3g} {unit[0]}" if number else "0"


def size(number: float) -> str:
    scale, unit = _unit(number, "B")
    return f"{number / scale:,.1f} {unit}" if number else "0"


def _unit(number: float, of: str) -> tuple[float, str]:
    """What to divide by, and what that many are called. Bytes stay GB from 0.1 to 10,000 of them."""
    least = {"E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9} if of == "FLOPs" else {"T": 1e13, "G": 1e8}
    sizes = {"E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6}
    prefix = next((prefix for prefix, start in least.items() if number >= 0.9995 * start), "M")
    return sizes[prefix], prefix + of


def _times(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count > 1 else ''}"


def _fed(load: Load) -> str:
    if not load.pictures:
        return "no picture"
    each = "each " if load.pictures > 1 else ""
    return f"{_times(load.pictures, 'picture')}, {each}{load.picture_tokens:,} tokens ({load.tiles:,} tiles in all)"


def _lesson(way: str, now: Step) -> list[str]:
    """Why freezing saves what it saves."""
    cost, trained = now.cost, WAYS[way]
    if not cost.backward:
        return ["Without a picture there is nothing here to learn from: no backward pass."]
    if "text" not in trained:
        return [
            f"The text is frozen, yet the gradient passes through it to what trains before it: "
            f"{flops(cost.text.backward)} backward, all for its inputs, none for its weights."
        ]
    return ["A frozen encoder with nothing trained before it has no backward pass."] if "encoder" not in trained else []


def _bars(axes: Axes, costs: dict[str, list[float]], looks: dict, ends: dict[str, str], of: str, way: str):
    """A row for each way of training, its parts end to end; `ends` says what they come to."""
    scale, unit = _unit(max(map(sum, costs.values())), of)
    rows, left = range(len(costs)), [0.0] * len(costs)
    for part, (label, (_, look)) in enumerate(looks.items()):
        widths = [parts[part] / scale for parts in costs.values()]
        axes.barh(rows, widths, 0.46, left, label=label, edgecolor="white", linewidth=0, **look)
        left = [start + more for start, more in zip(left, widths, strict=True)]
    for row, each in enumerate(costs):
        said = f"{'▸ ' if each == way else ''}{each}: {ends[each]}"
        axes.text(0.008 * max(left), row - 0.27, said, va="bottom", fontsize="small")
    axes.set(yticks=[], ylim=(len(costs) - 0.6, -1.35), xlim=(0, 1.04 * max(left)))
    # Above the axes, but not as their title: matplotlib takes as long to place one as to draw the rest.
    axes.text(0.5, 1.04, f"{'memory' if of == 'B' else 'one step'}, {unit}", transform=axes.transAxes, ha="center")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,g}"))
    axes.legend(loc="upper left", frameon=False, fontsize="small", ncols=4, columnspacing=1, handlelength=1.2)


# ----------------------------------------------------------------------------------------------------------------------
# The widget


class TrainingCost(View):
    """Choose a model, what trains, the optimizer, and what a step is fed. `table.value`: all ways, as HTML."""

    def __init__(self, preset: str = "scout"):
        self.table = ipywidgets.HTML()
        start = Load()
        tiles = {f"{n} ({Load(grid=n).picture_tokens:,} tokens)": n for n in GRID_TILES}
        controls = {
            "preset": ipywidgets.Dropdown(options=PRESETS, value=preset, description="model"),
            "way": ipywidgets.Dropdown(options=list(WAYS), description="trains"),
            "states": ipywidgets.Dropdown(options=OPTIMIZERS, description="optimizer"),
            "text": ipywidgets.BoundedIntText(start.text, min=1, max=1_000_000, step=100, description="text tokens"),
            "batch": ipywidgets.BoundedIntText(start.batch, min=1, max=10_000, description="sequences"),
            "pictures": ipywidgets.IntSlider(start.pictures, 0, 48, description="pictures", tooltip="in a sequence"),
            "grid": ipywidgets.SelectionSlider(
                options=tiles, value=start.grid, description="tiles", tooltip="of a picture's grid"
            ),
        }
        widths = dict(preset=300, way=300, states=420, text=200, batch=200, pictures=340, grid=420)
        for name, pixels in widths.items():
            controls[name].layout.width = f"{pixels}px"
        super().__init__(self._show, controls, ("preset way", "states text batch", "pictures grid"))
        *above, text, keys = self.box.children
        self.box.children = (*above, self.table, text, keys)

    def _show(self, preset, way, states, text, pictures, grid, batch) -> Shown:
        load = Load(text, pictures, grid, batch)
        self.table.value = table_tag(table(preset, load, states), way)
        return shown(preset, way, load, states)
