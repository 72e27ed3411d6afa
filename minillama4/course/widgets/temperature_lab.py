"""Temperature and weight lab: what hard and soft targets ask of a student at one real token, logit by logit.

A teacher and a student have read the same held-out text; their logits for what comes next are stored. Both softmax at a
temperature, the loss mixes the hard and the soft part, and the gradient on the student's logits has a closed form:

    hard, -log q(true)               q - onehot(true), at temperature 1
    soft, T² · KL(teacher ‖ student)   T · (q - p)
    soft, T² · KL(student ‖ teacher)   T · q · (log q - log p - KL)

Without T² both soft gradients are T² times smaller. Losses are in nats. Shapes: V vocabulary.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import ipywidgets
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from torch import Tensor

from ... import distill
from ..evidence import study
from .frame import BLUE, GREEN, ORANGE, RED, Shown, View

RESULTS = study.RESULTS / "distill_tokens.json"
TEMPERATURES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0, 16.0)
DIRECTIONS = {"teacher ‖ student (forward)": False, "student ‖ teacher (reverse)": True}
PLACES = ((0.115, 0.275), (0.425, 0.275), (0.775, 0.21))  # (left, width) of each chart, as shares of the picture
ROWS = 7  # tokens that a picture names; one more bar is for all others together


@dataclass(frozen=True)
class Moment:
    """One token of a text, and what both models expected there."""

    before: str  # the end of the text so far
    true: int  # id of the token that came
    teacher_V: Tensor  # logits, float64
    student_V: Tensor


@dataclass(frozen=True)
class Moments:
    teacher: str  # who they are, in words
    student: str
    vocabulary: list[str]
    tokens: list[Moment]


def read_moments(file: Path | str = RESULTS) -> Moments:
    """The stored tokens. Logits are stored as hundredths of a nat below the likeliest token's.

    ValueError: no such file, or one whose logits do not fit its vocabulary.
    """
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}; `python -m minillama4.course.evidence.distill` makes it")
    stored = json.loads(Path(file).read_text("utf-8"))
    size, tokens = len(stored["vocabulary"]), []
    for number, token in enumerate(stored["tokens"]):
        lengths = len(token["teacher"]), len(token["student"])
        if set(lengths) != {size} or not 0 <= token["true"] < size:
            raise ValueError(
                f"token {number} has {lengths[0]} and {lengths[1]} logits and true {token['true']}; "
                f"the vocabulary has {size} tokens"
            )
        logits = [-torch.tensor(token[who], dtype=torch.float64) / 100 for who in ("teacher", "student")]
        tokens.append(Moment(token["before"], token["true"], *logits))
    if not tokens:
        raise ValueError(f"{file} has no tokens; `python -m minillama4.course.evidence.distill` stores some")
    return Moments(stored["card"]["teacher"], stored["card"]["student"], stored["vocabulary"], tokens)


@dataclass(frozen=True)
class Parts:
    """The loss at one token and its gradient on the student's logits; the parts are not weighted yet."""

    hard: float
    soft: float  # T² included
    mixed: float
    hard_gradient_V: Tensor
    soft_gradient_V: Tensor
    soft_weight: float
    temperature: float

    @property
    def gradient_V(self) -> Tensor:
        return (1 - self.soft_weight) * self.hard_gradient_V + self.soft_weight * self.soft_gradient_V

    @property
    def norm(self) -> float:
        """Of the soft gradient."""
        return float(self.soft_gradient_V.norm())

    @property
    def norm_without(self) -> float:
        """The same, had the loss no T²."""
        return self.norm / self.temperature**2


@torch.no_grad()
def parts(moment: Moment, temperature: float = 1.0, soft_weight: float = 0.5, reverse: bool = False) -> Parts:
    """Losses by `minillama4.distill`, gradients in closed form.

    ValueError: a temperature of 0 or less, a weight outside 0..1.
    """
    teacher_V, student_V, true_T = moment.teacher_V, moment.student_V, torch.tensor([moment.true])
    hard_T = distill.hard_loss(student_V[None], true_T)
    soft_T = distill.soft_loss(student_V[None], teacher_V[None], temperature, reverse)
    hard_gradient_V = student_V.softmax(-1)
    hard_gradient_V[moment.true] -= 1
    log_p_V, log_q_V = ((logits_V / temperature).log_softmax(-1) for logits_V in (teacher_V, student_V))
    if reverse:
        apart_V = log_q_V - log_p_V
        soft_gradient_V = temperature * log_q_V.exp() * (apart_V - (log_q_V.exp() * apart_V).sum())
    else:
        soft_gradient_V = temperature * (log_q_V.exp() - log_p_V.exp())
    mixed = float(distill.mix(hard_T, soft_T, soft_weight))
    return Parts(float(hard_T), float(soft_T), mixed, hard_gradient_V, soft_gradient_V, soft_weight, temperature)


def named(moment: Moment, rows: int = ROWS) -> list[int]:
    """The tokens that a picture names: the true one and those that either model finds likeliest, likeliest first.

    They are chosen at temperature 1, so that rows stay where they are while the temperature moves.
    """
    chance_V = torch.maximum(moment.teacher_V.softmax(-1), moment.student_V.softmax(-1))
    order = chance_V.argsort(descending=True, stable=True).tolist()
    rest = [token for token in order if token != moment.true][: rows - 1]
    return sorted([moment.true, *rest], key=order.index)


# ----------------------------------------------------------------------------------------------------------------------
# In words and as a picture.


def shown(
    moments: Moments, number: int = 0, temperature: float = 1.0, soft_weight: float = 0.5, reverse: bool = False
) -> Shown:
    """One token under one loss. number: which of the stored ones. ValueError: no such token, or as in `parts`."""
    if not 0 <= number < len(moments.tokens):
        raise ValueError(f"number is {number}; there are tokens 0 to {len(moments.tokens) - 1}")
    moment = moments.tokens[number]
    seen = parts(moment, temperature, soft_weight, reverse)
    p_V, q_V = ((logits_V / temperature).softmax(-1) for logits_V in (moment.teacher_V, moment.student_V))
    text = "\n".join(_lines(moments, moment, seen, p_V, q_V, reverse))
    figure = Figure(figsize=(9, 3.3))
    chances, pushes, norms = (figure.add_axes((left, 0.145, width, 0.765)) for left, width in PLACES)
    ids = named(moment)
    labels = [("▸ " if token == moment.true else "") + _label(moments.vocabulary, token) for token in ids]
    _chances(chances, [*labels, "all others"], _with_rest(p_V, ids), _with_rest(q_V, ids), temperature)
    _pushes(pushes, seen, ids)
    _norms(norms, moment, seen, reverse)
    alt = (
        "Bars: probabilities of teacher and student for the likeliest tokens, and how far the loss pushes each logit. "
        f"Curves: size of the soft gradient by temperature, with and without T squared. {text}"
    )
    return Shown(text, figure, alt.replace("\n", " "))


def _lines(moments: Moments, moment: Moment, seen: Parts, p_V: Tensor, q_V: Tensor, reverse: bool) -> list[str]:
    true, temperature, w = moment.true, seen.temperature, seen.soft_weight
    sure = [float(logits_V.softmax(-1)[true]) for logits_V in (moment.teacher_V, moment.student_V)]
    push_V = -seen.gradient_V
    up, down = int(push_V.argmax()), int(push_V.argmin())
    name = [f"“{_visible(moments.vocabulary[token])}”" for token in (true, up, down)]
    kl = "KL(student ‖ teacher)" if reverse else "KL(teacher ‖ student)"
    pulls = -seen.hard_gradient_V[true], -seen.soft_gradient_V[true]
    lines = [
        f"…{_visible(moment.before)} → {name[0]}. Teacher ({moments.teacher}) gave it {sure[0]:.1%}, student "
        f"({moments.student}) {sure[1]:.1%}.",
        f"At temperature {temperature:g} the teacher's entropy is {_entropy(p_V):.2f} nats, the student's "
        f"{_entropy(q_V):.2f}.",
        f"Loss: hard {seen.hard:.3f} nats, soft {seen.soft:.3f} = {temperature:g}² · {kl}. Mixed: {1 - w:.2f} · hard + "
        f"{w:.2f} · soft = {seen.mixed:.3f}.",
        f"A step raises {name[1]} most ({_signed(push_V[up])}) and lowers {name[2]} most ({_signed(push_V[down])}).",
        f"Size of the soft gradient: {seen.norm:.3g}; without T² {seen.norm_without:.3g}. Of the hard one: "
        f"{float(seen.hard_gradient_V.norm()):.3g}.",
    ]
    if float(pulls[1]) < 0:  # the hard target always raises the true token
        lines.append(f"The two parts disagree on {name[0]}: hard {_signed(pulls[0])}, soft {_signed(pulls[1])}.")
    return lines


def _visible(text: str) -> str:
    """Spaces at an end would not be seen, and a new line would break the line."""
    return re.sub("^ +| +$", lambda spaces: "␣" * len(spaces[0]), text.replace("\n", "↵"))


def _label(vocabulary: list[str], token: int) -> str:
    """For the picture, whose font knows few scripts, and no half characters, as some tokens are."""
    text, known = _visible(vocabulary[token]), get_font(findfont("DejaVu Sans")).get_charmap()
    if not text or "\ufffd" in text or not all(ord(each) in known for each in text):
        return f"token {token}"
    return text if len(text) <= 11 else text[:10] + "…"


def _signed(number: Tensor | float) -> str:
    return f"{float(number):+.3f}"


def _entropy(p_V: Tensor) -> float:
    return float(torch.special.entr(p_V).sum())


def _with_rest(values_V: Tensor, ids: list[int]) -> list[float]:
    """The values of the named tokens, and the sum of all others."""
    kept = values_V[ids]
    rest = values_V.clone()
    rest[ids] = 0  # not total minus kept, which is noise where nothing is left
    return [*kept.tolist(), float(rest.sum())]


def _chances(axes: Axes, labels: list[str], p: list[float], q: list[float], temperature: float):
    rows = range(len(labels))
    axes.barh([row - 0.2 for row in rows], [100 * each for each in p], 0.4, color=BLUE, label="teacher")
    axes.barh([row + 0.2 for row in rows], [100 * each for each in q], 0.4, color=ORANGE, hatch="////",
              edgecolor="white", linewidth=0, label="student")  # fmt: skip
    axes.set(title=f"probability at T = {temperature:g}, %", xlim=(0, 105), ylim=(len(labels) - 0.4, -1.9))
    axes.set_yticks(rows, labels, parse_math=False)
    axes.tick_params(axis="y", length=0, labelsize="small")
    axes.set_xticks([0, 50, 100])
    axes.legend(loc="upper right", frameon=False, fontsize="small", ncols=2, columnspacing=1, handlelength=1.4)


def _pushes(axes: Axes, seen: Parts, ids: list[int]):
    """Minus the gradient, so that what goes to the right is raised; both parts with their weights."""
    hard = _with_rest(-(1 - seen.soft_weight) * seen.hard_gradient_V, ids)
    soft = _with_rest(-seen.soft_weight * seen.soft_gradient_V, ids)
    both = [one + other for one, other in zip(hard, soft, strict=True)]
    rows = range(len(both))
    axes.barh([row - 0.2 for row in rows], hard, 0.4, color=GREEN, label="hard")
    axes.barh([row + 0.2 for row in rows], soft, 0.4, color=BLUE, hatch="////", edgecolor="white", linewidth=0,
              label="soft")  # fmt: skip
    axes.plot(both, rows, "D", color="white", markeredgecolor="black", markersize=4, label="sum")
    widest = max(1e-3, *map(abs, hard), *map(abs, soft), *map(abs, both))
    axes.vlines(0, -0.6, len(both) - 0.4, color="black", linewidth=0.8)
    axes.set(title="push on the logit (− gradient)", yticks=[], xlim=(-1.1 * widest, 1.1 * widest))
    axes.set_ylim(len(both) - 0.4, -1.9)
    axes.locator_params(axis="x", nbins=5)
    axes.legend(loc="upper center", frameon=False, fontsize="small", ncols=3, columnspacing=1, handlelength=1.4)


def _norms(axes: Axes, moment: Moment, seen: Parts, reverse: bool):
    each = [parts(moment, temperature, seen.soft_weight, reverse) for temperature in TEMPERATURES]
    axes.plot(TEMPERATURES, [e.norm for e in each], color=BLUE, label="soft, with T²")
    axes.plot(TEMPERATURES, [e.norm_without for e in each], color=RED, linestyle="--", label="soft, without")
    hard = float(seen.hard_gradient_V.norm())
    axes.axhline(hard, color=GREEN, linestyle=":", label="hard")
    axes.plot([seen.temperature] * 2, [seen.norm, seen.norm_without], "o", color=ORANGE, markeredgecolor="black",
              markersize=7, label="now")  # fmt: skip
    values = [value for e in each for value in (e.norm, e.norm_without)] + [hard]
    low, high = max(1e-5, min(values)), max(1e-4, *values)
    axes.set(title="size of the gradient", xlabel="temperature", xscale="log", xlim=(0.45, 18))
    axes.set(yscale="log", ylim=(low / 1.5, high * (high / low) ** 0.45 * 2))  # room for the legend
    axes.xaxis.set_major_locator(FixedLocator([0.5, 1, 2, 4, 8, 16]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda temperature, _: f"{temperature:g}"))
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.tick_params(axis="y", labelsize="small")
    axes.legend(loc="upper left", frameon=False, fontsize="small", handlelength=1.8, labelspacing=0.2)


class TemperatureLab(View):
    """Choose a token, a temperature, how much the soft part counts, and the direction of the KL."""

    def __init__(self, file: Path | str = RESULTS):
        self.moments = read_moments(file)
        options = {
            f"{number + 1}. …{_visible(moment.before[-48:])} → {_visible(self.moments.vocabulary[moment.true])}": number
            for number, moment in enumerate(self.moments.tokens)
        }
        controls = {
            "number": ipywidgets.Dropdown(options=options, description="token"),
            "reverse": ipywidgets.Dropdown(options=DIRECTIONS, description="KL"),
            "temperature": ipywidgets.SelectionSlider(
                options=[(f"{each:g}", each) for each in TEMPERATURES], value=1.0, description="temperature"
            ),
            "soft_weight": ipywidgets.FloatSlider(0.5, min=0, max=1, step=0.05, description="soft weight"),
        }
        controls["number"].layout.width, controls["reverse"].layout.width = "560px", "300px"
        for name in ("temperature", "soft_weight"):
            controls[name].layout.width = "420px"
        super().__init__(self._show, controls, ("number reverse", "temperature soft_weight"))

    def _show(self, **values) -> Shown:
        return shown(self.moments, **values)
