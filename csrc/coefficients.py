"""Writes coefficients.h: the approximations from which activations.h builds every function.

    python csrc/coefficients.py > csrc/coefficients.h        (needs mpmath; about half a minute)

Each fit minimises its largest weighted error against mpmath by Lawson's iteration: a least squares
fit whose weights grow where the error is large. Three functions are fitted, in three precisions:

    exp(r)                          |r| ≤ ln 2 / 2                   relative error
    M(a) = Φ(−a) exp(a²/2)          as a ratio p(a) / q(a)           relative error
    R(s) = (Φ(x) − ½) / x, s = x²   |x| ≤ 1                          error of Φ

M, a multiple of Mills' ratio, falls slowly from ½ to 1 / (a √2π). All coefficients of its fit are
positive, so nothing cancels, and its relative accuracy holds to the end of the tail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mpmath as mp

mp.mp.dps = 50
LIMIT = {"float": 13.3, "double": 37.7}  # where exp(−a²/2) leaves the normal numbers
DIGITS = {"float": 9, "double": 17}
Function = Callable[[mp.mpf], mp.mpf]


@dataclass
class Precision:
    name: str
    real: str
    purpose: str
    exp: int
    mills: tuple[int, int]
    centre: int | None  # None: M alone is accurate enough down to 0
    is_fast: bool = False  # exp and the division are a GPU's own approximations


PRECISIONS = [
    Precision("Half", "float", "results that are rounded to 16 bits", 4, (3, 4), None),
    Precision(
        "Fast",
        "float",
        "results that are rounded to 16 bits on a GPU",
        4,
        (3, 4),
        None,
        is_fast=True,
    ),
    Precision("Single", "float", "results in fp32", 6, (3, 4), 4),
    Precision("Double", "double", "results in fp64", 11, (9, 10), None),
]


def fit(
    function: Function, weight: Function, nodes: list[mp.mpf], degrees: tuple[int, int]
) -> tuple[list[mp.mpf], list[mp.mpf], mp.mpf]:
    """Numerator, denominator (lowest power first, q₀ = 1) and largest |weight · error|."""
    m, n = degrees
    values = [function(t) for t in nodes]
    weights = [weight(t) for t in nodes]
    lawson = [mp.mpf(1)] * len(nodes)
    below = [mp.mpf(1)] * len(nodes)  # the last denominator makes the linear problem the true one
    best: tuple[list[mp.mpf], list[mp.mpf], mp.mpf] = ([], [], mp.inf)
    for _ in range(30):
        rows = mp.matrix(len(nodes), m + n + 1)
        right = mp.matrix(len(nodes), 1)
        for i, t in enumerate(nodes):
            scale = mp.sqrt(lawson[i]) * weights[i] / below[i]
            for k in range(m + 1):
                rows[i, k] = scale * t**k
            for k in range(1, n + 1):
                rows[i, m + k] = -scale * values[i] * t**k
            right[i] = scale * values[i]
        solution = mp.lu_solve(rows.T * rows, rows.T * right)
        p = [solution[k] for k in range(m + 1)]
        q = [mp.mpf(1)] + [solution[m + k] for k in range(1, n + 1)]
        below = [mp.polyval(q[::-1], t) for t in nodes]
        errors = [
            abs(w * (mp.polyval(p[::-1], t) / d - f))
            for t, d, f, w in zip(nodes, below, values, weights, strict=True)
        ]
        largest = max(errors)
        if largest < best[2]:
            best = (p, q, largest)
        lawson = [w * (e / largest + mp.mpf("1e-3")) for w, e in zip(lawson, errors, strict=True)]
    return best


def nodes(low: float, high: float, power: int = 1, count: int = 100) -> list[mp.mpf]:
    """Chebyshev's points; power 2 crowds them at the lower end."""
    u = [(1 - mp.cos(mp.pi * (i + mp.mpf(1) / 2) / count)) / 2 for i in range(count)]
    return [low + (mp.mpf(high) - low) * v**power for v in u]


def mills(a: mp.mpf) -> mp.mpf:
    return mp.erfc(a / mp.sqrt(2)) / 2 * mp.exp(a * a / 2)


def centre(s: mp.mpf) -> mp.mpf:
    return mp.erf(mp.sqrt(s / 2)) / (2 * mp.sqrt(s))


def call(variable: str, coefficients: list[mp.mpf], real: str) -> str:
    suffix = "f" if real == "float" else ""
    terms = [mp.nstr(c, DIGITS[real], min_fixed=0, max_fixed=0) + suffix for c in coefficients]
    return f"horner({variable}, {', '.join(terms)})"


def struct(precision: Precision) -> str:
    real = precision.real
    half_ln2 = mp.log(2) / 2
    interval = nodes(-half_ln2, half_ln2)
    if precision.exp == 4:  # its error is far above what rounded coefficients add
        p, _, exp_error = fit(mp.exp, lambda r: mp.exp(-r), interval, (precision.exp, 0))
    else:  # 1 + r is exact: the rounding of its coefficients would show
        q, _, exp_error = fit(
            lambda r: (mp.expm1(r) - r) / r**2,
            lambda r: r**2 * mp.exp(-r),
            interval,
            (precision.exp - 2, 0),
        )
        p = [mp.mpf(1), mp.mpf(1), *q]
    start = 0 if precision.centre is None else 1
    n, d, mills_error = fit(
        mills, lambda a: 1 / mills(a), nodes(start, LIMIT[real], power=2), precision.mills
    )
    above, under = call("a", n, real), call("a", d, real)
    divided = f"{above} * fast_reciprocal({under})"
    if not precision.is_fast:
        divided = f"divide({above}, {under})"
    lines = [
        f"// For {precision.purpose}.",
        f"struct {precision.name} {{",
        f"  using real = {real};",
        f"  static constexpr bool has_centre = {'false' if precision.centre is None else 'true'};",
        f"  static constexpr bool is_fast = {'true' if precision.is_fast else 'false'};",
        "",
    ]
    if not precision.is_fast:
        lines += [
            f"  // exp(r), |r| <= ln 2 / 2: relative error {mp.nstr(exp_error, 2)}",
            "  template <class T>",
            f"  GN_INLINE static T exp(T r) {{ return {call('r', p, real)}; }}",
            "",
        ]
    lines += [
        f"  // Phi(-a) exp(a^2 / 2), {start} <= a <= {LIMIT[real]}: "
        f"relative error {mp.nstr(mills_error, 2)}",
        "  template <class T>",
        "  GN_INLINE static T mills(T a) {",
        f"    return {divided};",
        "  }",
    ]
    if precision.centre is not None:
        r, _, error = fit(centre, mp.sqrt, nodes(0, 1), (precision.centre, 0))
        lines += [
            "",
            f"  // (Phi(x) - 1/2) / x of s = x^2 <= 1: error of Phi {mp.nstr(error, 2)}",
            "  template <class T>",
            f"  GN_INLINE static T centre(T s) {{ return {call('s', r, real)}; }}",
        ]
    return "\n".join([*lines, "};"])


def main() -> None:
    print("// Written by coefficients.py, which says what is fitted and how. Do not edit.")
    print("// clang-format off")
    print("#pragma once\n\nnamespace gn_kernels {\n")
    print("\n\n".join(struct(precision) for precision in PRECISIONS))
    print("\n}  // namespace gn_kernels")


if __name__ == "__main__":
    main()
