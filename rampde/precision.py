"""Which dtype sums are formed in, and which real dtype a complex one is made of."""

import torch

# torch.dtype.to_real says the same, but torch.compile does not know it
_PARTS = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the real and the imaginary part; ``dtype`` itself where it is real."""
    return _PARTS.get(dtype, dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Real dtype of sums with a term of ``dtype``: float64 where that has 64 bits, else float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
