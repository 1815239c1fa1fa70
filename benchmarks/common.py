"""What the benchmarks share: the machine, interleaved timing, rows, tables, comparison of runs."""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import gc
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

Row = dict[str, Any]

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("torch", "triton", "timm", "gn_kernels", "liger_kernel")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

# A sample shorter than this would measure the clock.
_SAMPLE_S = 5e-3

# What of the environment changes a figure: it belongs to the command of a row.
_VARIABLES = re.compile("(OMP|MKL|KMP|MALLOC|ONEDNN|DNNL|GLIBC|TORCH|TRITON_INTERPRET|LD_PRELOAD)")
_NOT_FIGURES = ("TORCHINDUCTOR_CACHE_DIR", "TORCH_HOME", "TORCH_LOGS")


class Timing(NamedTuple):
    """Seconds a call: median, 20th and 80th percentile of the samples."""

    median: float
    low: float
    high: float
    samples: int


def summary(samples: Sequence[float]) -> Timing:
    """Median and 20th and 80th percentile, interpolated between samples."""
    if len(samples) < 2:
        raise ValueError(f"samples must be at least 2, but got {len(samples)}")
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), low, high, len(samples))


def interleave(
    providers: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, Timing]:
    """Time the providers in turn, ``rounds`` times, each round beginning with another one.

    Whatever slows the machine down for a while then slows all of them. Each is warmed up first,
    and called often enough in a sample for the clock. Python's garbage collector is off meanwhile.
    """
    names = list(providers)
    calls = {}
    for name, run in providers.items():
        seconds = _elapsed(run, 1, device)
        if seconds < 100 * _SAMPLE_S:  # may be the first call's own doing
            seconds = _elapsed(run, 1, device)
        calls[name] = max(1, math.ceil(_SAMPLE_S / seconds))
        if calls[name] > 1:
            _elapsed(run, calls[name], device)
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                seconds = _elapsed(providers[name], calls[name], device)
                samples[name].append(seconds / calls[name])
    finally:
        gc.enable()
    return {name: summary(taken) for name, taken in samples.items()}


def _elapsed(run: Callable[[], object], calls: int, device: str) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else int
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize()
    return time.perf_counter() - start


def one_line(error: Exception) -> str:
    """What a provider raised, for a table."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {textwrap.shorten(lines[0], 90)}"


def relative(timing: Timing, baseline: Timing) -> Row:
    """Time ÷ the baseline's time of the same run, and the interval that their spreads allow."""
    return {
        "relative": timing.median / baseline.median,
        "relative_low": timing.low / baseline.high,
        "relative_high": timing.high / baseline.low,
    }


def milliseconds(timing: Timing) -> Row:
    return {
        "median_ms": timing.median * 1e3,
        "p20_ms": timing.low * 1e3,
        "p80_ms": timing.high * 1e3,
        "samples": timing.samples,
    }


@functools.cache
def environment(command: str) -> Row:
    """The columns that say where and how a row was made."""
    gpu = "none"
    if torch.cuda.is_available():
        gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return {
        "cpu": f"{_cpu()}, {_capability()}, {_last_cache()}",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # of the minute before: above 0.5 others were at work
        "gpu": gpu,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": command,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _capability() -> str:
    """The vector instructions that PyTorch uses, and the matrix unit that its products use."""
    amx = " and AMX" if torch.cpu._is_amx_tile_supported() else ""
    return torch.backends.cpu.get_cpu_capability() + amx


def _last_cache() -> str:
    """What a tensor may lie in between two calls."""
    found = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return f"last cache {found[-1].read_text().strip()}" if found else "cache unknown"


def _version(package: str) -> str:
    if package == "gn_kernels":  # a checkout need not be installed
        from gn_kernels.version import __version__

        return __version__
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return "absent"


def _commit() -> str:
    """Of the checkout; dirty where anything but the results of these commands is not committed."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", ":/", ":(exclude)results", ":(exclude)*.md")
    except (OSError, subprocess.CalledProcessError):
        return "not a commit"
    return f"{commit}-dirty" if changed else commit


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The options that every command has."""
    result = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--quick", action="store_true", help="small sizes; the commands together in two minutes"
    )
    result.add_argument(
        "--output", type=Path, default=None, help="folder of the CSV and JSON (default: results/)"
    )
    result.add_argument(
        "--compare",
        type=_folder,
        help="folder of an earlier run: exit with 1 where this one is worse, beyond the noise",
    )
    return result


def samples(text: str) -> int:
    """An option's number of samples: percentiles take two."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is no number of samples: give 2 or more")
    return int(text)


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder: name that of an earlier run")
    return Path(text)


def command_line(module: str, argv: Sequence[str] | None) -> str:
    """How to run it again, with the variables that change what is measured.

    Without the options that name folders of this machine.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    for option in ("--output", "--compare"):
        while option in given:
            at = given.index(option)
            del given[at : at + 2]
        given = [argument for argument in given if not argument.startswith(f"{option}=")]
    return shlex.join([*_variables(), "python", "-m", f"benchmarks.{module}", *given])


def _variables() -> list[str]:
    return [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if _VARIABLES.match(name) and name not in _NOT_FIGURES
    ]


def kept_pages() -> bool:
    """Whether glibc was told to keep freed memory, so that no result lies on fresh pages."""
    return os.environ.get("MALLOC_MMAP_MAX_") == "0" and "MALLOC_TRIM_THRESHOLD_" in os.environ


class Table(NamedTuple):
    """The rows of one file, what names a row, and what of it is compared between two runs."""

    name: str
    rows: list[Row]
    key: tuple[str, ...]
    interval: Callable[[Row], tuple[float, float] | None]  # None: not compared


def finish(tables: Iterable[Table], arguments: argparse.Namespace) -> int:
    """Write CSV and JSON, compare with an earlier run; the exit status.

    A quick run is for a look: it is written only where ``--output`` says. Rows of an earlier run
    in the same folder stay, but for those that this one made again: a table may be measured in
    pieces, and each row names its own command and commit.
    """
    folder = arguments.output or (None if arguments.quick else RESULTS)
    failures: list[str] = []
    for table in tables:
        earlier: list[Row] | None = None
        if arguments.compare is not None:  # before this run is written: it may be the same folder
            try:
                earlier = read(table.name, arguments.compare)
            except FileNotFoundError:
                failures.append(f"--compare: {arguments.compare} has no {table.name}.csv")
        if folder is not None:
            write(table.name, merged(table, folder), folder)
        failures += [
            f"{' '.join(str(row[column]) for column in table.key)}: {row['error']}"
            for row in table.rows
            if row.get("error")
        ]
        if earlier is not None:
            failures += regressions(table, earlier)
            print(_comparison(table, earlier))
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return int(bool(failures))


def _key(table: Table, row: Row) -> tuple[str, ...]:
    # A number read from a file is a float: 64 and 64.0 name the same row.
    return tuple(str(_number(str(row.get(column, "")))) for column in table.key)


def merged(table: Table, folder: Path) -> list[Row]:
    """The rows of a folder with those of a table in the place of the ones that they replace."""
    path = folder / f"{table.name}.json"
    if not path.exists():
        return table.rows
    fresh = {_key(table, row): row for row in table.rows}
    kept = [row for row in json.loads(path.read_text()) if _key(table, row) not in fresh]
    return kept + table.rows


def _comparison(table: Table, earlier: list[Row]) -> str:
    """How much was compared, and where the two runs are not alike."""
    before = {_key(table, row): row for row in earlier}
    pairs = [(before[_key(table, r)], r) for r in table.rows if _key(table, r) in before]
    compared = sum(table.interval(old) is not None for old, _ in pairs)
    differ = [
        column
        for column in ("cpu", "threads", "gpu", "torch", "triton")
        if any(old.get(column) != _number(str(new.get(column))) for old, new in pairs)
    ]
    note = f"; not of the same {', '.join(differ)}: expect differences" if differ else ""
    return f"{table.name}: {compared} figures compared with the earlier run{note}"


def write(name: str, rows: list[Row], folder: Path) -> None:
    """``name.csv`` and ``name.json``, with the same rows."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _rounded(value) for key, value in row.items()} for row in rows)
    (folder / f"{name}.json").write_text(json.dumps(rows, indent=1, default=str) + "\n")


def _rounded(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def read(name: str, folder: Path) -> list[Row]:
    """The rows of ``name.csv``, numbers as float."""
    with (folder / f"{name}.csv").open(newline="") as file:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def regressions(table: Table, earlier: list[Row]) -> list[str]:
    """What is worse than in an earlier run: its whole interval lies above the earlier one's.

    A row that the earlier run had with a figure and that has none now is a regression too. Rows of
    only one of the runs are not compared; where that is all of them, the comparison says nothing,
    and fails.
    """
    before = {_key(table, row): table.interval(row) for row in earlier}
    found, compared = [], 0
    for row in table.rows:
        name = " ".join(_key(table, row))
        old, new = before.get(_key(table, row)), table.interval(row)
        if old is None:
            continue
        compared += 1
        if new is None:
            found.append(f"{name}: had a figure in the earlier run, has none now")
        elif not new[0] <= old[1]:  # NaN is worse than anything
            found.append(f"{name}: {new[0]:.4g} to {new[1]:.4g}, was {old[0]:.4g} to {old[1]:.4g}")
    if not compared:
        found.append(f"{table.name}: the earlier run has none of the rows of this one")
    return found


def measured_interval(row: Row) -> tuple[float, float] | None:
    """That of the time ÷ the baseline's; only gn_kernels' own rows are compared."""
    if "gn_kernels" not in row["provider"] or row.get("relative") in (None, ""):
        return None
    return float(row["relative_low"]), float(row["relative_high"])


def markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A table whose columns are ``{heading: key of a row}``, aligned so that it reads as text."""
    body = [[_cell(row.get(key)) for key in columns.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(list(columns), *body, strict=True)]
    numeric = [
        any(isinstance(row.get(key), (int, float)) for row in rows) for key in columns.values()
    ]

    def line(cells: Iterable[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join(
        "-" * (width + 1) + (":" if right else "-")
        for width, right in zip(widths, numeric, strict=True)
    )
    return "\n".join([line(columns), f"|{rule}|", *map(line, body)])


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "–"
    return number(value) if isinstance(value, (int, float)) else str(value)


def number(value: float) -> str:
    """Three digits or so: 1,234; 12.3; 0.12; 1.2e-05."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if not 0.01 <= abs(value) < 1e6:
        return f"{value:.1e}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"
