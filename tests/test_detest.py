"""The non-stiff problems of DETEST: what tolerances are worth.

T. E. Hull, W. H. Enright, B. M. Fellen, A. E. Sedgwick, Comparing numerical methods for ordinary differential
equations, SIAM J. Numer. Anal. 9, 1972: five classes of five problems on [0, 20].
"""

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy
import pytest
import torch
from torch import Tensor

from rampde import odeint

integrate = pytest.importorskip("scipy.integrate")

F64 = torch.float64
END = 20.0


class Problem(NamedTuple):
    func: Callable[[Tensor, Tensor], Tensor]
    y0: list[float]


def tridiagonal(size: int, below: list[float], diagonal: list[float], above: list[float]) -> Tensor:
    matrix = torch.zeros(size, size, dtype=F64)
    for i in range(size):
        matrix[i, i] = diagonal[i]
        if i > 0:
            matrix[i, i - 1] = below[i - 1]
        if i + 1 < size:
            matrix[i, i + 1] = above[i]
    return matrix


def linear(matrix: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, y: matrix @ y


def b1(t: Tensor, y: Tensor) -> Tensor:
    """The growth of two conflicting populations."""
    return torch.stack([2 * (y[0] - y[0] * y[1]), -(y[1] - y[0] * y[1])])


def b3(t: Tensor, y: Tensor) -> Tensor:
    """A nonlinear chemical reaction."""
    return torch.stack([-y[0], y[0] - y[1] ** 2, y[1] ** 2])


def b4(t: Tensor, y: Tensor) -> Tensor:
    """The integral surface of a torus."""
    r = torch.sqrt(y[0] ** 2 + y[1] ** 2)
    return torch.stack([-y[1] - y[0] * y[2] / r, y[0] - y[1] * y[2] / r, y[0] / r])


def b5(t: Tensor, y: Tensor) -> Tensor:
    """Euler's equations of a rigid body without external forces."""
    return torch.stack([y[1] * y[2], -y[0] * y[2], -0.51 * y[0] * y[1]])


# C1: a radioactive decay chain; C3 and C4: the heat equation on 10 and 51 points
C1 = tridiagonal(10, [1.0] * 9, [-1.0] * 9 + [0.0], [0.0] * 9)
C2 = tridiagonal(10, [float(i) for i in range(1, 10)], [-float(i) for i in range(1, 10)] + [0.0], [0.0] * 9)
C3 = tridiagonal(10, [1.0] * 9, [-2.0] * 10, [1.0] * 9)
C4 = tridiagonal(51, [1.0] * 50, [-2.0] * 51, [1.0] * 50)

# C5: the five outer planets around the sun and the inner ones: masses relative to the sun, days / 100, astronomical
# units; positions and velocities of Jupiter, Saturn, Uranus, Neptune and Pluto
K2 = 2.95912208286
M0 = 1.00000597682
MASSES = torch.tensor(
    [0.954786104043e-3, 0.285583733151e-3, 0.437273164546e-4, 0.517759138449e-4, 0.277777777778e-5], dtype=F64
)
POSITIONS = [
    *(3.42947415189, 3.35386959711, 1.35494901715),
    *(6.64145542550, 5.97156957878, 2.18231499728),
    *(11.2630437207, 14.6952576794, 6.27960525067),
    *(-30.1552268759, 1.65699966404, 1.43785752721),
    *(-21.1238353380, 28.4465098142, 15.3882659679),
]
VELOCITIES = [
    *(-0.557160570446, 0.505696783289, 0.230578543901),
    *(-0.415570776342, 0.365682722812, 0.169143213293),
    *(-0.325325669158, 0.189706021964, 0.0877265322780),
    *(-0.0240476254170, -0.287659532608, -0.117219543175),
    *(-0.176860753121, -0.216393453025, -0.0148647893090),
]


def c5(t: Tensor, y: Tensor) -> Tensor:
    x, v = y[:15].view(5, 3), y[15:].view(5, 3)
    r3 = x.square().sum(1) ** 1.5
    between = x[None] - x[:, None]  # [i, j] from i to j
    d3 = (between.square().sum(2) + torch.eye(5, dtype=y.dtype)) ** 1.5
    pull = MASSES[None, :, None] * (between / d3[..., None] - (x / r3[:, None])[None])
    pull = pull * (1 - torch.eye(5, dtype=y.dtype))[..., None]
    acceleration = K2 * (-(M0 + MASSES)[:, None] * x / r3[:, None] + pull.sum(1))
    return torch.cat([v.flatten(), acceleration.flatten()])


def orbit(t: Tensor, y: Tensor) -> Tensor:
    r3 = (y[0] ** 2 + y[1] ** 2) ** 1.5
    return torch.stack([y[2], y[3], -y[0] / r3, -y[1] / r3])


def orbit_start(eccentricity: float) -> list[float]:
    return [1 - eccentricity, 0.0, 0.0, math.sqrt((1 + eccentricity) / (1 - eccentricity))]


def e1(t: Tensor, y: Tensor) -> Tensor:
    """Bessel's equation of order 1/2, the origin shifted by one unit."""
    return torch.stack([y[1], -(y[1] / (t + 1) + (1 - 0.25 / (t + 1) ** 2) * y[0])])


def e2(t: Tensor, y: Tensor) -> Tensor:
    """Van der Pol's equation."""
    return torch.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]])


def e3(t: Tensor, y: Tensor) -> Tensor:
    """Duffing's equation."""
    return torch.stack([y[1], y[0] ** 3 / 6 - y[0] + 2 * torch.sin(2.78535 * t)])


def e4(t: Tensor, y: Tensor) -> Tensor:
    """The falling body."""
    return torch.stack([y[1], 0.032 - 0.4 * y[1] ** 2])


def e5(t: Tensor, y: Tensor) -> Tensor:
    """The curve of pursuit."""
    return torch.stack([y[1], torch.sqrt(1 + y[1] ** 2) / (25 - t)])


PROBLEMS: dict[str, Problem] = {
    "A1": Problem(lambda t, y: -y, [1.0]),
    "A2": Problem(lambda t, y: -(y**3) / 2, [1.0]),
    "A3": Problem(lambda t, y: y * torch.cos(t), [1.0]),
    "A4": Problem(lambda t, y: y / 4 * (1 - y / 20), [1.0]),
    "A5": Problem(lambda t, y: (y - t) / (y + t), [4.0]),
    "B1": Problem(b1, [1.0, 3.0]),
    "B2": Problem(linear(tridiagonal(3, [1.0, 1.0], [-1.0, -2.0, -1.0], [1.0, 1.0])), [2.0, 0.0, 1.0]),
    "B3": Problem(b3, [1.0, 0.0, 0.0]),
    "B4": Problem(b4, [3.0, 0.0, 0.0]),
    "B5": Problem(b5, [0.0, 1.0, 1.0]),
    "C1": Problem(linear(C1), [1.0] + [0.0] * 9),
    "C2": Problem(linear(C2), [1.0] + [0.0] * 9),
    "C3": Problem(linear(C3), [1.0] + [0.0] * 9),
    "C4": Problem(linear(C4), [1.0] + [0.0] * 50),
    "C5": Problem(c5, POSITIONS + VELOCITIES),
    **{f"D{n}": Problem(orbit, orbit_start(0.1 + 0.2 * (n - 1))) for n in range(1, 6)},
    "E1": Problem(e1, [0.6713967071418030, 0.09540051444747446]),
    "E2": Problem(e2, [2.0, 0.0]),
    "E3": Problem(e3, [0.0, 0.0]),
    "E4": Problem(e4, [30.0, 0.0]),
    "E5": Problem(e5, [0.0, 0.0]),
}


@lru_cache
def reference(name: str, times: tuple[float, ...], perturbed: int | None = None, size: float = 1e-5) -> Tensor:
    """The solution at ``times`` by another code, to the last digits; ``perturbed`` numbers a random perturbation of the
    initial state by ``size (1 + |y|)``."""
    func, y0 = PROBLEMS[name]
    if perturbed is not None:
        direction = numpy.random.default_rng(perturbed).standard_normal(len(y0))
        direction *= size / math.sqrt(numpy.mean(direction**2))
        y0 = [y + d * (1 + abs(y)) for y, d in zip(y0, direction.tolist(), strict=True)]

    def on_arrays(t: float, y: numpy.ndarray) -> numpy.ndarray:
        return numpy.asarray(func(torch.tensor(t, dtype=F64), torch.from_numpy(numpy.array(y))))

    found = integrate.solve_ivp(on_arrays, (0.0, END), y0, "DOP853", t_eval=times, rtol=1e-13, atol=1e-13)
    assert found.success
    return torch.from_numpy(found.y.T.copy())


def scaled(difference: Tensor, at: Tensor) -> Tensor:
    """The norm in which the error of a step is measured, with a relative and an absolute tolerance of 1, by row."""
    return (difference / (1 + at.abs())).square().mean(1).sqrt()


@lru_cache
def condition(name: str, times: tuple[float, ...]) -> Tensor:
    """By how much the problem magnifies what disturbs it at the start, at least 1, at each of ``times``.

    An orbit turns an error of its energy into one of its phase, which grows with time: no method can help it.
    """
    exact = reference(name, times)
    moved = [scaled(reference(name, times, n) - exact, exact) / 1e-5 for n in range(4)]
    return torch.stack(moved).amax(0).clamp(min=1.0)


def achieved(name: str, method: str, tolerance: float, times: tuple[float, ...], stop: bool) -> float:
    """The largest error at ``times`` in units of the tolerance, less what the problem magnifies."""
    func, y0 = PROBLEMS[name]
    t = torch.tensor((0.0, *times), dtype=F64)
    options = {"step_t": list(times)} if stop else None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        y = odeint(
            func,
            torch.tensor(y0, dtype=F64),
            t,
            rtol=tolerance,
            atol=tolerance,
            method=method,
            options=options,
        )[1:]
    exact = reference(name, times)
    return float((scaled(y - exact, exact) / tolerance / condition(name, times)).max())


TOLERANCES = [1e-3, 1e-6, pytest.param(1e-9, marks=pytest.mark.slow)]


def test_reference_of_problems_with_known_solutions() -> None:
    """The problems are written as in the literature where their solutions are known in closed form."""
    end = (END,)
    assert reference("A1", end)[0, 0] == pytest.approx(math.exp(-20), abs=1e-12)
    assert reference("A2", end)[0, 0] == pytest.approx(1 / math.sqrt(21), abs=1e-12)
    assert reference("A3", end)[0, 0] == pytest.approx(math.exp(math.sin(20)), abs=1e-11)
    assert reference("A4", end)[0, 0] == pytest.approx(20 / (1 + 19 * math.exp(-5)), abs=1e-10)
    for name in ("C1", "B3"):
        # nothing is lost
        assert float(reference(name, end).sum()) == pytest.approx(1.0, abs=1e-11)
    # the energy of an orbit is -1/2, its angular momentum that of the start
    for n in range(1, 6):
        x, y, u, v = reference(f"D{n}", end)[0].tolist()
        assert (u * u + v * v) / 2 - 1 / math.hypot(x, y) == pytest.approx(-0.5, abs=1e-10)
        assert x * v - y * u == pytest.approx(math.sqrt(1 - (0.1 + 0.2 * (n - 1)) ** 2), abs=1e-10)
    # J_1/2(x) = sqrt(2 / (pi x)) sin(x)
    assert reference("E1", end)[0, 0] == pytest.approx(math.sqrt(2 / (math.pi * 21)) * math.sin(21), abs=1e-11)
    # two integrals of the rigid body
    a, b, c = reference("B5", end)[0].tolist()
    assert a * a + b * b == pytest.approx(1.0, abs=1e-11)
    assert 0.51 * a * a + c * c == pytest.approx(1.0, abs=1e-11)


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5", "bosh3"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_error_at_the_end_is_within_a_factor_100_of_the_tolerance(problem: str, method: str, tolerance: float) -> None:
    """Of the tolerance, times by how much the problem magnifies a disturbance of its start."""
    assert achieved(problem, method, tolerance, (END,), stop=True) <= 100


@pytest.mark.parametrize("problem", PROBLEMS)
def test_outputs_between_steps_are_within_a_factor_100_of_the_tolerance(problem: str) -> None:
    times = tuple(numpy.linspace(0, END, 14)[1:].tolist())
    assert achieved(problem, "dopri5", 1e-6, times, stop=False) <= 100
