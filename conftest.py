"""So that a plain `pytest --nbval notebooks/` is the strict one; without `--nbval` the plugin does nothing."""

pytest_plugins = ["minillama4.course.nbval_strict"]
