"""What the reproduction trains, in which order."""

import dataclasses

from gn_kernels.reproduce import FULL, QUICK, matrix
from gn_kernels.reproduce.matrix import METHODS

RUNS = matrix()
NAMES = [run.name for run in RUNS]


def test_every_claim_has_its_runs_once_and_the_most_important_come_first():
    assert len(set(NAMES)) == len(NAMES) == 114
    assert set(NAMES[:6]) == {
        f"fashion-mnist-vit-gelu-{method}-{seed}"
        for method in ("gradnorm", "pgd-3")
        for seed in range(3)
    }
    expected = {
        *(
            f"{data}-{model}-gelu-{method}"
            for data in ("fashion-mnist", "patches")
            for model in ("vit", "resnet")
            for method in ("natural", "fgsm", "pgd-3", "gradnorm", "edge")
        ),
        *(
            f"{data}-resnet-{act}-{method}"
            for data in ("fashion-mnist", "patches")
            for act in ("relu", "silu")
            for method in ("natural", "pgd-3", "gradnorm")
        ),
        *(f"patches-vit-gelu-gradnorm-{weight}" for weight in (0.8, 1.6, 1.8)),
        *(f"patches-resnet-{act}-gradnorm-1.6" for act in ("relu", "gelu", "silu")),
    }
    assert set(NAMES) == {f"{name}-{seed}" for name in expected for seed in range(3)}
    # After the headline seed by seed, so that an unfinished matrix has all claims.
    seeds = [int(name[-1]) for name in NAMES[6:]]
    assert seeds == sorted(seeds)


def test_runs_differ_in_what_their_name_says_and_nothing_else():
    def recipe(run):
        own = {"dataset", "image_size", "patch_size", "eps_255", "train_images", "epochs"}
        own |= {"warmup_epochs", "ramp_per_epoch", "model", "embed_dim", "depth", "num_heads"}
        own |= {"activation", "method", "pgd_steps", "seed", "weight_ce", "weight_gradnorm"}
        return {k: v for k, v in dataclasses.asdict(run.settings).items() if k not in own}

    assert all(recipe(run) == recipe(RUNS[0]) for run in RUNS)
    for run in RUNS:
        weights = run.settings.weight_ce, run.settings.weight_gradnorm
        assert sum(weights) == 2
        if run.method not in METHODS:
            assert f"-gradnorm-{weights[1]}-" in run.name
        else:
            assert weights == (0.8, 1.2)
    by_data = {}
    for run in RUNS:
        settings = run.settings
        values = settings.eps_255, settings.train_images, settings.epochs, settings.ramp_per_epoch
        assert by_data.setdefault(settings.dataset, values) == values
        assert settings.attack_radius_255 == settings.eps_255
        assert (settings.pgd_steps == 1) == (run.method == "fgsm")
    assert all(run.settings.depth >= 6 for run in RUNS if run.settings.model == "vit")


def test_quick_has_every_kind_of_run_and_costs_a_small_part():
    quick = matrix(QUICK, seeds=1)
    assert {run.name for run in quick} == {name for name in NAMES if name.endswith("-0")}
    assert sum(run.seconds() for run in quick) < 0.1 * sum(run.seconds() for run in RUNS)


def test_validation_uses_other_seeds_and_other_images():
    runs = matrix(FULL, 2, validate=True)
    assert {run.settings.seed for run in runs} == {1000, 1001}
    assert all(run.settings.validate for run in runs)
    assert not any(run.settings.validate for run in RUNS)


def test_folders_reach_the_runs_of_their_data():
    for run in matrix(seeds=1, data={"patches": "photos"}):
        assert run.settings.data == {"patches": "photos"}.get(run.settings.dataset)
