"""The methods by name, and the registry for a user's own."""

from fractions import Fraction as F
from typing import TypeVar

from rampde.adams import ADAMS_METHODS
from rampde.implicit_tableau import IMPLICIT_METHODS, ImplicitTableau
from rampde.scipy_solver import SCIPY_METHODS
from rampde.tableau import ButcherTableau, EmbeddedTableau

ADAPTIVE: dict[str, EmbeddedTableau] = {
    # P. J. Prince, J. R. Dormand, J. Comput. Appl. Math. 7, 1981; their coefficients are rounded rationals. The middle
    # of a step from the interpolant of order 7 in the same family
    "dopri8": EmbeddedTableau(
        a=[
            [],
            [1 / 18],
            [1 / 48, 1 / 16],
            [1 / 32, 0, 3 / 32],
            [5 / 16, 0, -75 / 64, 75 / 64],
            [3 / 80, 0, 0, 3 / 16, 3 / 20],
            [29443841 / 614563906, 0, 0, 77736538 / 692538347, -28693883 / 1125000000, 23124283 / 1800000000],
            [
                16016141 / 946692911,
                0,
                0,
                61564180 / 158732637,
                22789713 / 633445777,
                545815736 / 2771057229,
                -180193667 / 1043307555,
            ],
            [
                39632708 / 573591083,
                0,
                0,
                -433636366 / 683701615,
                -421739975 / 2616292301,
                100302831 / 723423059,
                790204164 / 839813087,
                800635310 / 3783071287,
            ],
            [
                246121993 / 1340847787,
                0,
                0,
                -37695042795 / 15268766246,
                -309121744 / 1061227803,
                -12992083 / 490766935,
                6005943493 / 2108947869,
                393006217 / 1396673457,
                123872331 / 1001029789,
            ],
            [
                -1028468189 / 846180014,
                0,
                0,
                8478235783 / 508512852,
                1311729495 / 1432422823,
                -10304129995 / 1701304382,
                -48777925059 / 3047939560,
                15336726248 / 1032824649,
                -45442868181 / 3398467696,
                3065993473 / 597172653,
            ],
            [
                185892177 / 718116043,
                0,
                0,
                -3185094517 / 667107341,
                -477755414 / 1098053517,
                -703635378 / 230739211,
                5731566787 / 1027545527,
                5232866602 / 850066563,
                -4093664535 / 808688257,
                3962137247 / 1805957418,
                65686358 / 487910083,
            ],
            [
                403863854 / 491063109,
                0,
                0,
                -5068492393 / 434740067,
                -411421997 / 543043805,
                652783627 / 914296604,
                11173962825 / 925320556,
                -13158990841 / 6184727034,
                3936647629 / 1978049680,
                -160528059 / 685178525,
                248638103 / 1413531060,
                0,
            ],
        ],
        b=[
            14005451 / 335480064,
            0,
            0,
            0,
            0,
            -59238493 / 1068277825,
            181606767 / 758867731,
            561292985 / 797845732,
            -1041891430 / 1371343529,
            760417239 / 1151165299,
            118820643 / 751138087,
            -528747749 / 2220607170,
            1 / 4,
        ],
        error=[
            14005451 / 335480064 - 13451932 / 455176623,
            0,
            0,
            0,
            0,
            -59238493 / 1068277825 + 808719846 / 976000145,
            181606767 / 758867731 - 1757004468 / 5645159321,
            561292985 / 797845732 - 656045339 / 265891186,
            -1041891430 / 1371343529 + 3867574721 / 1518517206,
            760417239 / 1151165299 - 465885868 / 322736535,
            118820643 / 751138087 - 53011238 / 667516719,
            -528747749 / 2220607170 - 2 / 45,
            1 / 4,
        ],
        middle=[
            0.04103130360739393,
            0,
            0,
            0,
            0,
            0.05100562801991382,
            0.2388930677412202,
            0.3096870143996103,
            -0.2172325471755352,
            0.07833405679331928,
            -0.0018614369715579948,
            0.007072844202678841,
            0.00690847373200576,
            -0.013838404349047373,
        ],
    ),
    # J. R. Dormand, P. J. Prince, J. Comput. Appl. Math. 6, 1980; error and middle of L. F. Shampine, Math. Comp. 46,
    # 1986
    "dopri5": EmbeddedTableau(
        a=[
            [],
            [F(1, 5)],
            [F(3, 40), F(9, 40)],
            [F(44, 45), F(-56, 15), F(32, 9)],
            [F(19372, 6561), F(-25360, 2187), F(64448, 6561), F(-212, 729)],
            [F(9017, 3168), F(-355, 33), F(46732, 5247), F(49, 176), F(-5103, 18656)],
            [F(35, 384), 0, F(500, 1113), F(125, 192), F(-2187, 6784), F(11, 84)],
        ],
        b=[F(35, 384), 0, F(500, 1113), F(125, 192), F(-2187, 6784), F(11, 84), 0],
        error=[
            F(35, 384) - F(1951, 21600),
            0,
            F(500, 1113) - F(22642, 50085),
            F(125, 192) - F(451, 720),
            F(-2187, 6784) + F(12231, 42400),
            F(11, 84) - F(649, 6300),
            F(-1, 60),
        ],
        middle=[
            6025192743 / 30085553152 / 2,
            0,
            51252292925 / 65400821598 / 2,
            -2691868925 / 45128329728 / 2,
            187940372067 / 1594534317056 / 2,
            -1776094331 / 19743644256 / 2,
            11237099 / 235043384 / 2,
        ],
    ),
    # Ch. Tsitouras, Comput. Math. Appl. 62, 2011
    "tsit5": EmbeddedTableau(
        a=[
            [],
            [0.161],
            [-0.008480655492356989, 0.335480655492357],
            [2.8971530571054935, -6.359448489975075, 4.3622954328695815],
            [5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525],
            [5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383],
            [
                0.09646076681806523,
                0.01,
                0.4798896504144996,
                1.379008574103742,
                -3.2900695154360807,
                2.324710524099774,
            ],
        ],
        b=[0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.2900695154360807, 2.324710524099774, 0],
        error=[
            -0.001780011052225771443378550607539534775944678804,
            -0.0008164344596567469032236360633546411862401862537590,
            0.007880878010261996010314727672526304238628733777,
            -0.1447110071732629053716514797263511672092271234317,
            0.5823571654525552250199376106520421794260781239567,
            -0.4580821059291869466616365188325542974428047279788,
            1 / 66,
        ],
        middle=[
            0.10741235230100377,
            0.01135625,
            0.39560903056045305,
            -0.34475214352593553,
            1.3161853649581645,
            -1.0170608542936508,
            0.03125,
        ],
    ),
    # P. Bogacki, L. F. Shampine, Appl. Math. Lett. 2, 1989. Between steps the cubic interpolant: the middle of a step
    # as torchdiffeq has it, y + h k_2 / 2, is of order one, and so makes outputs worse than the tolerance
    "bosh3": EmbeddedTableau(
        a=[[], [F(1, 2)], [0, F(3, 4)], [F(2, 9), F(1, 3), F(4, 9)]],
        b=[F(2, 9), F(1, 3), F(4, 9), 0],
        error=[F(2, 9) - F(7, 24), F(1, 3) - F(1, 4), F(4, 9) - F(1, 3), F(-1, 8)],
    ),
    # E. Fehlberg, NASA technical report R-315, 1969
    "fehlberg2": EmbeddedTableau(
        a=[[], [F(1, 2)], [F(1, 256), F(255, 256)]],
        b=[F(1, 512), F(255, 256), F(1, 512)],
        error=[F(-1, 512), 0, F(1, 512)],
    ),
    # K. Heun, Z. Math. Phys. 45, 1900, with L. Euler's method embedded
    "adaptive_heun": EmbeddedTableau(
        a=[[], [1]],
        b=[F(1, 2), F(1, 2)],
        error=[F(-1, 2), F(1, 2)],
    ),
}

FIXED: dict[str, ButcherTableau] = {
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

METHODS: dict[str, object] = {
    **ADAPTIVE,
    **FIXED,
    **ADAMS_METHODS,
    **IMPLICIT_METHODS,
    **SCIPY_METHODS,
}

DEFAULT = "dopri5"


Tableau = TypeVar("Tableau", ButcherTableau, EmbeddedTableau, ImplicitTableau)


def register_method(name: str, tableau: Tableau) -> Tableau:
    """Makes ``odeint(..., method=name)`` use ``tableau``.

    Returns:
        ``tableau``, whose ``order`` is then known to have been checked to be at least 1.

    Raises:
        TypeError: ``name`` is not a string or ``tableau`` not a tableau.
        ValueError: the name is empty or taken by another tableau.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}, expected a string")
    if not isinstance(tableau, ButcherTableau | ImplicitTableau):
        raise TypeError(f"tableau is {tableau!r}, expected a rampde.ButcherTableau")
    if not name:
        raise ValueError("name is empty, expected a name for the method")
    if METHODS.get(name, tableau) != tableau:
        raise ValueError(f"name is {name!r}, which another method has; expected a new name")
    METHODS[name] = tableau
    return tableau


def get_method(method: object) -> object:
    """The method of a registered name, or ``method`` itself where it is a tableau; None means dopri5.

    Raises:
        TypeError: neither a string nor a tableau.
        ValueError: an unknown name; the message lists the known ones.
    """
    if isinstance(method, ButcherTableau | ImplicitTableau):
        return method
    if method is None:
        method = DEFAULT
    if not isinstance(method, str):
        raise TypeError(f"method is {method!r}, expected a name or a rampde.ButcherTableau")
    if method in METHODS:
        return METHODS[method]
    known = ", ".join(f'"{name}"' for name in METHODS)
    raise ValueError(f'Invalid method "{method}". Must be one of {{{known}}}.')
