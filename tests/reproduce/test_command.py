"""``gn-kernels reproduce``: names, patterns, a report from what is there, errors."""

import json

import pytest

from gn_kernels import cli
from gn_kernels.reproduce import all_jobs, matrix
from gn_kernels.reproduce.matrix import QUICK
from tests.reproduce.test_report import _result

pytest.importorskip("pyautoattack")


def _list(capsys, *options):
    assert cli.main(["reproduce", "--list", *options]) == 0
    return capsys.readouterr().out.split()


def test_names_and_patterns(capsys):
    names = _list(capsys)
    assert len(names) == 116
    assert names[0] == "cost-vit"
    assert len(_list(capsys, "--quick")) == 40
    assert _list(capsys, "--only", "patches-vit-gelu-edge-?,cost-*") == [
        *("cost-vit", "cost-resnet"),
        *(f"patches-vit-gelu-edge-{seed}" for seed in range(3)),
    ]


def test_a_pattern_that_matches_nothing_names_the_nearest_run(capsys):
    assert cli.main(["reproduce", "--only", "cost-vitt"]) == 2
    assert "no run is named 'cost-vitt'; the nearest is cost-vit" in capsys.readouterr().err


def test_finished_runs_are_not_computed_again(tmp_path, capsys):
    run, *others = matrix(QUICK, 1)
    _, (job, *_) = all_jobs([run, *others], QUICK)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / f"{job.name}.json").write_text(json.dumps(_result(run)))
    options = ["reproduce", "--quick", "--output", str(tmp_path), "--only"]
    for only in (job.name, "report"):
        assert cli.main([*options, only]) == 0
        assert "report.html" in capsys.readouterr().out
        assert "from 1 of 40 results" in (tmp_path / "report.md").read_text()
    # The full matrix has another plan under the same name.
    assert cli.main(["reproduce", "--output", str(tmp_path), "--only", job.name]) == 2
    assert "result of another plan" in capsys.readouterr().err


def test_without_results_there_is_no_report(tmp_path, capsys):
    assert cli.main(["reproduce", "--output", str(tmp_path), "--only", "report"]) == 2
    assert "holds no result yet" in capsys.readouterr().err
