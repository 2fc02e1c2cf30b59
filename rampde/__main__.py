"""``python -m rampde``: which version, on what, and which backend every operator uses on every device."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from rampde import ops


def package_version(package: str) -> str:
    """Version of an installed package, in words where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def backend(operator: str, device: str) -> str:
    """What runs ``rampde::<operator>`` on a "cpu" or "cuda" device: "C++", "Triton", "CUDA" or "ATen"."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    # private, and only asked here: there is no public question of this kind
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"rampde::{operator}", key):
        return "ATen"
    if device == "cpu":
        return "C++"
    return "Triton" if operator in ops.TRITON_OPERATORS else "CUDA"


def gpus() -> list[str]:
    """One line for each GPU that PyTorch sees."""
    lines = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = found.total_memory / 2**30
        lines.append(f"{found.name}, {memory:.0f} GiB, compute capability {found.major}.{found.minor}")
    return lines


def report() -> str:
    """The whole report, as it is printed."""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    lines = [
        f"rampde     {package_version('rampde')}",
        f"torch      {torch.__version__} ({built})",
        f"triton     {package_version('triton')}",
        f"python     {platform.python_version()} on {platform.platform()}",
        *(f"GPU {index}      {line}" for index, line in enumerate(gpus())),
    ]
    if not torch.cuda.is_available():
        lines.append("GPU        none that PyTorch can use")
    lines += [f"extension  {ops.MISSING or 'rampde._C is built and loaded'}", ""]
    width = max(map(len, ops.SCHEMAS))
    lines.append(f"{'operator':<{width}}  cpu     cuda    elsewhere")
    for operator in ops.SCHEMAS:
        lines.append(f"{operator:<{width}}  {backend(operator, 'cpu'):<6}  {backend(operator, 'cuda'):<6}  ATen")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
