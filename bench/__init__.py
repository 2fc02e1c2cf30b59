"""Benchmarks: ``python -m bench.kernels`` and ``python -m bench.solvers``, run from the repository root."""
