"""An independent run in low precision: exact arithmetic in which matrix products are rounded."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PRODUCTS = (torch.nn.functional.linear, torch.addmm, torch.Tensor.matmul, torch.Tensor.__matmul__)


class RoundedProducts(TorchFunctionMode):
    """Rounds the factors and the results of matrix products, in arithmetic that is else exact: what a velocity in that
    precision loses, without any solver in 16 bits."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        rounded = [argument if argument is None else self.round(argument) for argument in args]
        return self.round(func(*rounded, **(kwargs or {})))

    def round(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(x.dtype)
