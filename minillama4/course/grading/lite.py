"""`import minillama4.course...` without the model: the start of each process is most of what grading a notebook costs.

Run by its path, before anything of the package is imported. Needs nothing but Python.
"""

import os
import sys
import types


def package_without_model(folder: str) -> None:
    """Let `folder` be the package `minillama4`. Its `__init__.py` runs when a name of it is first asked for."""
    if "minillama4" in sys.modules:
        return
    package = types.ModuleType("minillama4")
    package.__path__ = [folder]
    package.__file__ = os.path.join(folder, "__init__.py")
    package.__package__ = "minillama4"

    def load(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        del package.__getattr__
        with open(package.__file__, encoding="utf-8") as file:
            exec(compile(file.read(), package.__file__, "exec"), package.__dict__)
        return getattr(package, name)

    package.__getattr__ = load
    sys.modules["minillama4"] = package
