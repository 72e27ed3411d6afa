"""What teaches. A lesson or an exercise begins with `from minillama4.course import check, hint, progress`."""

from .checking import CheckFailed, check, hint, progress

__all__ = ["CheckFailed", "check", "hint", "progress"]
