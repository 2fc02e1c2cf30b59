"""The published experiments, as modules that run with ``python -m experiments.<name>``."""
