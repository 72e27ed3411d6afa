"""What lessons claim to have measured: one command a file, its results beside it in `results/`."""
