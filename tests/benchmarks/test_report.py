"""The page and its figures from the rows of CSV files."""

import pytest

from benchmarks import common, report


@pytest.fixture
def results(tmp_path):
    where = common.environment("python -m benchmarks.operations")
    rows = [
        {
            "operation": "gelu",
            "device": "cpu",
            "memory": "fresh",
            "dimensions": "8×16",
            "dtype": "float32",
            "order": order,
            "provider": provider,
            "median_ms": ms,
            "p20_ms": ms * 0.9,
            "p80_ms": ms * 1.1,
            "speedup": 8.0 / ms,
            "versus_copy": ms,
            "error": "",
            "note": "",
        }
        | where
        for order in ("forward", "double backward", "cycle")
        for provider, ms in (("gn_kernels", 2.0), ("eager", 8.0), ("inductor, formula", 1.0))
    ]
    common.write("operations", rows, tmp_path)
    return tmp_path


def test_the_page_marks_names_and_confesses(results):
    page = report.render(results)
    assert "One operation (measured)" in page
    assert "python -m benchmarks.operations" in page
    assert "takes 0.50 of our time" in page  # Inductor is faster here, and the page says so
    assert page == report.render(results)


@pytest.mark.parametrize(
    ("alone_ms", "call_ms", "words"),
    [
        (1.05, 0.1, "kernel itself"),
        (1.9, 0.1, "No reason"),
        (1.9, 0.7, "Less the time of a call"),
        (1.9, None, "No reason"),
    ],
)
def test_the_reason_is_measured_too(results, alone_ms, call_ms, words):
    rows = common.read("operations", results)
    for row in [row for row in rows if row["provider"] == "gn_kernels"]:
        row["dimensions"] = "8×384"
        times = {"median_ms": alone_ms, "p20_ms": 0.9 * alone_ms, "p80_ms": 1.1 * alone_ms}
        rows.append(row | {"provider": "gn_kernels, no autograd"} | times)
    rows = [row | {"dimensions": "8×384"} for row in rows]
    if call_ms is not None:
        small = [row for row in rows if row["provider"] == "gn_kernels, no autograd"]
        rows += [row | {"dimensions": "1×64", "median_ms": call_ms} for row in small]
    common.write("operations", rows, results)
    page = report.render(results)
    assert words in page.split("and why:")[1].split("Without a figure")[0]
    assert "gn_kernels, no autograd takes" not in page


def test_figures_are_drawn_and_stay_the_same(results):
    report.draw(results)
    first = (results / "operations.svg").read_bytes()
    report.draw(results)
    assert (results / "operations.svg").read_bytes() == first
    assert (results / "operations.png").stat().st_size > 1000


def test_the_page_in_the_repository_is_what_the_files_give():
    assert report.README.read_text() == report.render(common.RESULTS)
