"""Writes the coefficients of gn_kernels/activation/triton_kernels.py, highest power first.

    python -m benchmarks.coefficients        (needs mpmath; about half a minute)

Each is the polynomial p that makes the largest |weight · (p − target)| smallest, found by the
Remez exchange on a Chebyshev grid.
"""

from __future__ import annotations

from collections.abc import Callable

from mpmath import cos, erfc, exp, expm1, lu_solve, matrix, mp, mpf, ncdf, nstr, pi, polyval, sqrt

Function = Callable[[mpf], mpf]


def minimax(
    target: Function, weight: Function, low: mpf, high: mpf, degree: int, grid: int = 400
) -> tuple[list[mpf], mpf]:
    """Coefficients, highest power first, and the largest weighted error."""
    points = [low + (high - low) * (1 - cos(pi * i / grid)) / 2 for i in range(grid + 1)]
    values = [target(u) for u in points]
    weights = [weight(u) for u in points]
    count = degree + 2
    chosen = [round(grid * i / (count - 1)) for i in range(count)]
    best: tuple[list[mpf], mpf] = ([], mpf("inf"))
    for _ in range(30):
        rows, right = matrix(count, count), matrix(count, 1)
        for row, i in enumerate(chosen):
            for power in range(degree + 1):
                rows[row, power] = weights[i] * points[i] ** power
            rows[row, degree + 1] = (-1) ** row
            right[row] = weights[i] * values[i]
        solution = lu_solve(rows, right)
        coefficients = [solution[power] for power in reversed(range(degree + 1))]
        errors = [
            w * (polyval(coefficients, u) - v)
            for u, v, w in zip(points, values, weights, strict=True)
        ]
        largest = max(map(abs, errors))
        if largest < best[1]:
            best = (coefficients, largest)
        extrema = _extrema(errors)
        if len(extrema) < count or extrema == chosen:
            break
        while len(extrema) > count:
            extrema.pop(0 if abs(errors[extrema[0]]) < abs(errors[extrema[-1]]) else -1)
        chosen = extrema
    return best


def _extrema(errors: list[mpf]) -> list[int]:
    # The place of the largest error in every run of one sign.
    starts = [i for i in range(len(errors)) if i == 0 or (errors[i] > 0) != (errors[i - 1] > 0)]
    ends = [*starts[1:], len(errors)]
    return [
        max(range(start, end), key=lambda i: abs(errors[i]))
        for start, end in zip(starts, ends, strict=True)
    ]


def tail() -> tuple[list[mpf], mpf]:
    """Φ(−a) = exp(−a²/2)·t·p(t) with t = 1/(1 + 0.26a), 0 ≤ a ≤ 14.

    The weight is that of the relative error, relaxed up to 8 times where a·Φ(−a) is subnormal in
    fp16: further out only bf16 needs relative accuracy.
    """

    def a_of(t: mpf) -> mpf:
        return (1 / t - 1) / TAIL_SCALE

    def target(t: mpf) -> mpf:
        return erfc(a_of(t) / sqrt(2)) / 2 * exp(a_of(t) ** 2 / 2) / t

    def weight(t: mpf) -> mpf:
        a = a_of(t)
        relaxed = 1 if a < 1 else min(max(mpf(2) ** -14 / (a * ncdf(-a)), 1), 8)
        return 1 / (target(t) * relaxed)

    return minimax(target, weight, 1 / (1 + 14 * TAIL_SCALE), mpf(1), 6)


def centre() -> tuple[list[mpf], mpf]:
    """Φ(x) = ½ + x·p(x²), |x| ≤ 2; the weight is that of Φ's absolute error."""
    tiny = mpf(10) ** -15
    return minimax(
        lambda s: (ncdf(sqrt(s)) - mpf(1) / 2) / sqrt(s), sqrt, tiny, mpf(4), CENTRE_DEGREE
    )


def exponential() -> tuple[list[mpf], mpf]:
    """exp(r) = 1 + r + r²·p(r), |r| ≤ ½·ln 2; the weight is that of the relative error."""
    bound = mp.log(2) / 2

    def target(r: mpf) -> mpf:
        return (expm1(r) - r) / r**2

    return minimax(target, lambda r: r**2 / exp(r), -bound, bound * (1 + mpf("1e-6")), 4, grid=401)


TAIL_SCALE = mpf("0.26")
CENTRE_DEGREE = 7


def main() -> None:
    mp.dps = 40
    for name, (coefficients, error) in (
        ("_TAIL", tail()),
        ("_CENTRE", centre()),
        ("_EXP", exponential()),
    ):
        print(f"{name} = ({', '.join(nstr(c, 9) for c in coefficients)})  # {nstr(error, 2)}")


if __name__ == "__main__":
    main()
