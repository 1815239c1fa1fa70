"""Percentiles, interleaving, tables, files, and the comparison of two runs."""

import argparse

import pytest

from benchmarks import common, operations, step_cost
from benchmarks.common import Table, Timing


def test_summary_interpolates_between_samples():
    assert common.summary([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == Timing(3.5, 2.0, 5.0, 6)


def test_summary_needs_two_samples():
    with pytest.raises(ValueError, match="at least 2"):
        common.summary([1.0])


def test_interleave_takes_turns_and_rotates(monkeypatch):
    order = []
    monkeypatch.setattr(common, "_SAMPLE_S", 0.0)
    providers = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = common.interleave(providers, rounds=3)
    assert "".join(order[-9:]) == "abcbcacab"
    assert set(timings) == set("abc")
    assert all(timing.samples == 3 for timing in timings.values())


def row(name, relative, spread=0.1, provider="gn_kernels"):
    return {
        "operation": name,
        "provider": provider,
        "relative": relative,
        "relative_low": relative * (1 - spread),
        "relative_high": relative * (1 + spread),
    }


def table(*rows):
    return Table("operations", list(rows), ("operation", "provider"), common.measured_interval)


def test_a_change_inside_the_noise_is_no_regression():
    assert common.regressions(table(row("gelu", 0.22)), [row("gelu", 0.2)]) == []


def test_a_change_beyond_the_noise_is_one():
    (found,) = common.regressions(table(row("gelu", 0.3)), [row("gelu", 0.2)])
    assert "gelu" in found


def test_what_runs_faster_is_none():
    assert common.regressions(table(row("gelu", 0.1)), [row("gelu", 0.2)]) == []


def test_a_figure_that_is_gone_is_a_regression():
    red = {"operation": "gelu", "provider": "gn_kernels", "error": "wrong"}
    (found,) = common.regressions(table(red), [row("gelu", 0.2)])
    assert "has none now" in found


def test_a_peer_is_not_compared_and_a_new_row_neither():
    peer = row("gelu", 9.0, provider="eager")
    new, same = row("silu", 9.0), row("tanh", 1.0)
    earlier = [row("gelu", 0.2, provider="eager"), row("tanh", 1.0)]
    assert common.regressions(table(peer, new, same), earlier) == []


def test_nan_is_a_regression():
    (found,) = common.regressions(table(row("gelu", float("nan"))), [row("gelu", 0.2)])
    assert "nan" in found


def test_a_comparison_of_nothing_fails():
    (found,) = common.regressions(table(row("silu", 9.0)), [row("gelu", 0.2)])
    assert "none of the rows" in found


def arguments(folder, compare=None, quick=False):
    return argparse.Namespace(output=folder, compare=compare, quick=quick)


def test_finish_writes_what_read_reads_and_compares(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert common.finish([table(row("gelu", 0.2))], arguments(first)) == 0
    assert common.read("operations", first)[0]["relative"] == 0.2
    assert (first / "operations.json").exists()
    assert common.finish([table(row("gelu", 0.2))], arguments(second, first)) == 0
    assert common.finish([table(row("gelu", 0.4))], arguments(second, first)) == 1
    assert "gelu" in capsys.readouterr().err


def test_a_run_replaces_its_own_rows_and_leaves_the_others(tmp_path):
    common.finish([table(row("gelu", 0.2), row("silu", 0.3))], arguments(tmp_path))
    common.finish([table(row("gelu", 0.4))], arguments(tmp_path))
    found = {one["operation"]: one["relative"] for one in common.read("operations", tmp_path)}
    assert found == {"gelu": 0.4, "silu": 0.3}


def test_a_run_is_compared_with_what_it_replaces(tmp_path):
    common.finish([table(row("gelu", 0.2))], arguments(tmp_path))
    assert common.finish([table(row("gelu", 0.4))], arguments(tmp_path, tmp_path)) == 1


def test_a_folder_without_the_table_fails_and_the_run_is_kept(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert common.finish([table(row("gelu", 0.2))], arguments(tmp_path, empty)) == 1
    assert "has no operations.csv" in capsys.readouterr().err
    assert len(common.read("operations", tmp_path)) == 1


def test_a_row_that_a_number_names_is_found_again(tmp_path):
    def counted(relative):
        return table(row("gelu", relative) | {"batch": 64})._replace(key=("operation", "batch"))

    common.finish([counted(0.2)], arguments(tmp_path))
    assert common.finish([counted(0.2)], arguments(tmp_path, tmp_path)) == 0
    assert common.finish([counted(0.4)], arguments(tmp_path, tmp_path)) == 1
    assert len(common.read("operations", tmp_path)) == 1


def test_another_machine_is_named(tmp_path, capsys):
    here, there = row("gelu", 0.2) | {"cpu": "one"}, row("gelu", 0.2) | {"cpu": "another"}
    common.finish([table(here)], arguments(tmp_path))
    common.finish([table(there)], arguments(tmp_path, tmp_path))
    assert "not of the same cpu" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_refused_before_anything_runs(capsys):
    with pytest.raises(SystemExit):
        common.parser("operations", None).parse_args(["--compare", "/no/such/folder"])
    assert "is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("module", [operations, step_cost])
@pytest.mark.parametrize("rounds", ["1", "0", "many"])
def test_too_few_samples_are_refused_before_anything_runs(module, rounds, capsys):
    with pytest.raises(SystemExit):
        module.main(["--rounds", rounds])
    assert "2 or more" in capsys.readouterr().err


def test_a_red_row_is_a_failure(tmp_path):
    red = {"operation": "gelu", "provider": "gn_kernels", "error": "wrong"}
    assert common.finish([table(red)], arguments(tmp_path)) == 1


def test_a_quick_run_leaves_the_results_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    common.finish([table(row("gelu", 0.2))], arguments(None, quick=True))
    assert not (tmp_path / "results").exists()


def test_the_command_names_no_folder(monkeypatch):
    given = ["--quick", "--output", "/somewhere/else", "--compare=/there", "--part", "count"]
    for name in common.os.environ:
        if common._VARIABLES.match(name):
            monkeypatch.delenv(name)
    command = common.command_line("step_cost", given)
    assert command == "python -m benchmarks.step_cost --quick --part count"


def test_the_command_names_the_variables_that_change_what_it_measures(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    command = common.command_line("operations", [])
    assert "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000" in command
    assert common.kept_pages()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    assert not common.kept_pages()


def test_rows_carry_machine_versions_commit_and_command():
    row = common.environment("python -m benchmarks.accuracy")
    assert {"cpu", "threads", "gpu", "torch", "commit", "command", "date", "load"} <= row.keys()


def test_markdown_shows_every_row_and_marks_what_is_absent():
    text = common.markdown([{"a": "x", "b": 1234.5}, {"a": "y"}], {"name": "a", "ms": "b"})
    assert text.splitlines() == [
        "| name |    ms |",
        "|------|------:|",
        "| x    | 1,234 |",
        "| y    |     – |",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (float("nan"), "nan"),
        (0.0, "0"),
        (12.345, "12.3"),
        (0.123, "0.12"),
        (1.2e-5, "1.2e-05"),
        (3022, "3,022"),
    ],
)
def test_numbers(value, text):
    assert common.number(value) == text
