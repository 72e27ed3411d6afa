"""The frame of every widget: controls above, a picture and a line of text below, a pure function in between.

A widget's whole state lies in traits of the kernel: `view.controls[name].value` goes in, `view.text.value` and
`view.picture.value` come out. So a cell can drive it as a learner would, and nbval can compare what it says.
Callbacks neither print nor touch pyplot, and switch gradients off themselves: newer versions of JupyterLab may run
them on another thread, where the notebook's own settings do not hold.
"""

import base64
import html
import io
import threading
from collections.abc import Callable
from dataclasses import dataclass

import ipywidgets
import torch
from IPython.display import Image as Still
from matplotlib.figure import Figure
from PIL import Image

# Colours that also people who see few hues can tell apart (Okabe and Ito).
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#7f7f7f"

SHARP = 2  # dots of a Figure on each pixel of the page, for screens with fine dots; its inch is 100 pixels

# What ipywidgets has no door for. In a dropdown, JupyterLab takes plain keys for its own: an arrow leaves for the next
# cell, B adds a cell, D D deletes one; here they stay in the dropdown. Enter in a text pushes the primary button, and
# the text goes to the kernel first, which a message of ipywidgets ("submit") may overtake.
KEYS = """<style onload="
    const box = this.closest('.widget-vbox');
    if (box && !box.dataset.keys) box.addEventListener('keydown', event => {
        const at = event.target, plain = !(event.ctrlKey || event.metaKey || event.shiftKey || event.isComposing);
        if (plain && at.tagName == 'SELECT') event.stopPropagation();
        if (plain && at.tagName == 'INPUT' && event.key == 'Enter') {
            at.dispatchEvent(new Event('change', {bubbles: true}));
            box.querySelector('.mod-primary')?.click();
        }
    }, true);
    if (box) box.dataset.keys = 'own';
"></style>"""


@dataclass(frozen=True)
class Shown:
    """What a widget's function returns."""

    text: str  # plain text; lines are kept
    picture: Figure | Image.Image | None = None
    alt: str = ""  # the picture in words; without it there may be no picture


class View:
    """`show(**values of the controls) -> Shown`, called again whenever a control moves.

    A ValueError of `show` is shown as text: it says what to do. A cell ends with the view itself.
    """

    def __init__(self, show: Callable[..., Shown], controls: dict[str, ipywidgets.Widget], rows: tuple[str, ...] = ()):
        """rows: names of controls that share a line, separated by spaces; by default each has its own."""
        self.show, self.controls = show, controls
        self.text, self.picture = ipywidgets.HTML(), ipywidgets.HTML()
        self._lock, self._reacting = threading.RLock(), False
        for control in controls.values():
            control.tooltip = control.tooltip or ""  # the browser would make a tooltip "null" of None
            if isinstance(control, ipywidgets.Button):
                control.on_click(self.changed)
            else:
                control.observe(self.changed, "value")
        lines = [[controls[name] for name in row.split()] for row in rows] or [
            [control] for control in controls.values()
        ]
        layout = ipywidgets.Layout(flex_flow="row wrap")
        top = [line[0] if len(line) == 1 else ipywidgets.HBox(line, layout=layout) for line in lines]
        keys = ipywidgets.HTML(KEYS, layout=ipywidgets.Layout(display="none"))
        self.box = ipywidgets.VBox([*top, self.picture, self.text, keys])
        self.changed()

    def _repr_mimebundle_(self, **options) -> dict:
        """The live widget; where no kernel runs, and for nbval, what it says."""
        bundle = self.box._repr_mimebundle_(**options)
        bundle = bundle[0] if isinstance(bundle, tuple) else bundle
        return bundle | {"text/plain": f"{type(self).__name__}, a widget: run this notebook to use it\n{self.says()}"}

    def values(self) -> dict:
        return {name: c.value for name, c in self.controls.items() if not isinstance(c, ipywidgets.Button)}

    def react(self, event):
        """For a widget that remembers: what a control does beside its value. Controls that this moves react no more.

        event: the button that was pressed, a change as of `observe`, or None.
        """

    def changed(self, event=None):
        """A control has moved: react, and show what the controls now say."""
        with self._lock, torch.no_grad():
            if self._reacting:
                return
            self._reacting = True
            try:
                self.react(event)
            finally:
                self._reacting = False
            self.update()

    def update(self):
        try:
            shown = self.show(**self.values())
        except ValueError as error:
            shown = Shown(str(error))
        # A status is read out when it changes, to those who cannot see it change.
        style = "white-space: pre-line; line-height: 1.5"
        self.text.value = f'<div role="status" style="{style}">{html.escape(shown.text)}</div>'
        self.picture.value = img_tag(shown.picture, shown.alt) if shown.picture is not None else ""

    def says(self) -> str:
        """The text as a learner reads it."""
        return html.unescape(self.text.value.partition(">")[2].removesuffix("</div>"))

    def drive(self, **moves) -> str:
        """Move controls as a learner would, one after the other, and return what the widget then says.

        moves: name -> new value; for a button, how often to press it. ValueError: no such control.
        """
        for name, value in moves.items():
            if name not in self.controls:
                raise ValueError(f"there is no control {name!r}; there are {', '.join(self.controls)}")
            control = self.controls[name]
            if isinstance(control, ipywidgets.Button):
                for _ in range(value):
                    control.click()
            else:
                control.value = value
        return self.says()


def png(picture: Figure | Image.Image) -> tuple[bytes, int, int]:
    """The file, and its width and height on the page."""
    stream, sharp = io.BytesIO(), 1
    if isinstance(picture, Figure):
        sharp = SHARP
        picture.savefig(stream, format="png", dpi=100 * sharp)
    else:
        picture.save(stream, format="png")
    width, height = Image.open(stream).size
    return stream.getvalue(), width // sharp, height // sharp


def img_tag(picture: Figure | Image.Image, alt: str) -> str:
    """For HTML. Its size is given, so that the page keeps the room and does not jump when the picture changes."""
    words = html.escape(_words(alt), quote=True)
    data, width, height = png(picture)
    source, style = f"data:image/png;base64,{base64.b64encode(data).decode()}", "max-width: 100%; height: auto"
    return f'<img src="{source}" alt="{words}" width={width} height={height} style="{style}">'


def still(shown: Shown) -> Still:
    """The picture of a widget as a cell's output: what a reader on GitHub sees, where no kernel runs."""
    words = _words(shown.alt)
    data, width, _ = png(shown.picture)
    return Still(data=data, alt=words, width=width)


def _words(alt: str) -> str:
    if not alt.strip():
        raise ValueError("a picture needs alt text: what would you say to someone who cannot see it?")
    return alt
