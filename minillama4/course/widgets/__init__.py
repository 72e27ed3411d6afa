"""One file a widget: pure functions first, then a thin view over them (see `frame.py`)."""
