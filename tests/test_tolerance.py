"""The error budget accepts rounding and nothing else."""

import pytest
import torch
from tolerance import assert_within_budget, budget, largest_error

EXACT = torch.linspace(1.0, 3.0, 1001, dtype=torch.float64) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounding_passes(dtype: torch.dtype) -> None:
    assert_within_budget(EXACT.to(dtype), EXACT.to(dtype), EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_errors_of_a_few_units_fail(dtype: torch.dtype) -> None:
    wrong = EXACT.to(dtype).clone()
    wrong[500] += 8 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        assert_within_budget(wrong, EXACT.to(dtype), EXACT)


def test_result_rounded_to_a_coarser_dtype_fails() -> None:
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        assert_within_budget(EXACT.bfloat16().float(), EXACT.float(), EXACT)
    with pytest.raises(AssertionError, match="dtype"):
        assert_within_budget(EXACT.bfloat16(), EXACT.float(), EXACT)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_value_that_is_not_finite_fails(value: float) -> None:
    wrong = EXACT.float().clone()
    wrong[0] = value
    with pytest.raises(AssertionError, match="error inf"):
        assert_within_budget(wrong, EXACT.float(), EXACT)


def test_values_that_are_alike_without_being_finite_pass() -> None:
    exact = torch.tensor([torch.nan, torch.inf, 1.0], dtype=torch.float64)
    assert largest_error(exact.float(), exact) == 0.0


def test_empty_tensors_have_no_error() -> None:
    assert budget(torch.empty(0), torch.empty(0)) == 0.0
