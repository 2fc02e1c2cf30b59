"""Which dtype sums are formed in."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Real dtype of sums with a term of ``dtype``: float64 where that has 64 bits, else float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
