"""What the tests of Adams methods share: their names, a grid, a state, a corrector that converges to roundoff."""

from typing import Any

import torch

METHODS = ["explicit_adams", "implicit_adams"]
EQUAL = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)

# a corrector that converges to roundoff
CONVERGED: dict[str, Any] = {"rtol": 1e-14, "atol": 1e-15}
OPTIONS: dict[str, Any] = {"max_iters": 60}

Y0 = torch.tensor([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.1]], dtype=torch.float64)
