"""The path to one H100: int4 weights, and how they get there. Everything here also runs on a CPU, only slower.

`int4.py` is the format, with plain twins of all that a kernel computes on it; `load.py` puts weights on a device.
"""
