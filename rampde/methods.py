"""The fixed-step methods by name, and the registry for a user's own."""

from fractions import Fraction as F

from rampde.tableau import ButcherTableau

METHODS: dict[str, ButcherTableau] = {
    # L. Euler, Institutionum calculi integralis, 1768
    "euler": ButcherTableau(a=[[]], b=[1]),
    # C. Runge, Math. Annalen 46, 1895
    "midpoint": ButcherTableau(a=[[], [F(1, 2)]], b=[0, 1]),
    # K. Heun, Z. Math. Phys. 45, 1900: the trapezoidal and the third-order rule
    "heun2": ButcherTableau(a=[[], [1]], b=[F(1, 2), F(1, 2)]),
    "heun3": ButcherTableau(a=[[], [F(1, 3)], [0, F(2, 3)]], b=[F(1, 4), 0, F(3, 4)]),
    # A. Ralston, Math. Comp. 16, 1962: second order with the least bound on the truncation error
    "ralston": ButcherTableau(a=[[], [F(2, 3)]], b=[F(1, 4), F(3, 4)]),
    # W. Kutta, Z. Math. Phys. 46, 1901: the 3/8 rule, which torchdiffeq calls rk4
    "rk4": ButcherTableau(
        a=[[], [F(1, 3)], [F(-1, 3), 1], [1, -1, 1]],
        b=[F(1, 8), F(3, 8), F(3, 8), F(1, 8)],
    ),
    # W. Kutta, 1901: the rule of the textbooks
    "rk4_classic": ButcherTableau(
        a=[[], [F(1, 2)], [0, F(1, 2)], [0, 0, 1]],
        b=[F(1, 6), F(1, 3), F(1, 3), F(1, 6)],
    ),
}

ADAPTIVE = ("dopri8", "dopri5", "tsit5", "bosh3", "fehlberg2", "adaptive_heun")


def register_method(name: str, tableau: ButcherTableau) -> ButcherTableau:
    """Makes ``odeint(..., method=name)`` use ``tableau``.

    Returns:
        ``tableau``, whose ``order`` is then known to have been checked to be at least 1.

    Raises:
        TypeError: ``name`` is not a string or ``tableau`` not a :class:`ButcherTableau`.
        ValueError: the name is empty or taken by another tableau.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}, expected a string")
    if not isinstance(tableau, ButcherTableau):
        raise TypeError(f"tableau is {tableau!r}, expected a rampde.ButcherTableau")
    if not name:
        raise ValueError("name is empty, expected a name for the method")
    if name in ADAPTIVE or METHODS.get(name, tableau) != tableau:
        raise ValueError(f"name is {name!r}, which another method has; expected a new name")
    METHODS[name] = tableau
    return tableau


def get_tableau(method: str | ButcherTableau | None) -> ButcherTableau:
    """The tableau of ``method``, a registered name or a tableau.

    Raises:
        TypeError: neither a string nor a tableau.
        ValueError: an unknown name; the message lists the known ones.
    """
    if isinstance(method, ButcherTableau):
        return method
    if method is not None and not isinstance(method, str):
        raise TypeError(f"method is {method!r}, expected a name or a rampde.ButcherTableau")
    if method in METHODS:
        return METHODS[method]
    known = ", ".join(f'"{name}"' for name in METHODS)
    if method is None or method in ADAPTIVE:
        given = "None, which means dopri5" if method is None else f'"{method}"'
        raise ValueError(f"method is {given}: adaptive steps are not part of this release; expected one of {{{known}}}")
    raise ValueError(f'Invalid method "{method}". Must be one of {{{known}}}.')
