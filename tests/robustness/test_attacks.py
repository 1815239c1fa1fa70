"""PGD: its promises, and a linear model whose worst point is known."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gn_kernels.robustness import fgsm, pgd


@pytest.fixture
def model():
    torch.manual_seed(1)
    layers = (nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 3))
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


@pytest.fixture
def batch():
    torch.manual_seed(2)
    images = torch.rand(64, 3, 2, 2)
    images[:8], images[8:16] = 0, 1
    return images, torch.randint(3, (64,))


def _losses(model, images, labels):
    with torch.no_grad():
        return cross_entropy(model(images), labels, reduction="none")


def test_stays_in_the_ball_and_the_box(model, batch):
    images, labels = batch
    attacked = pgd(model, images, labels, 0.1, steps=5, step_size=0.08, restarts=2)
    assert not attacked.requires_grad
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    # One rounding of a number below 1.
    assert (attacked - images).abs().max() <= 0.1 + 6e-8
    assert (attacked - images).abs().max() > 0.09


def test_raises_the_loss_and_more_effort_raises_it_further(model, batch):
    images, labels = batch
    model.eval()
    clean = _losses(model, images, labels)

    def attack(**options):
        generator = torch.Generator().manual_seed(0)
        return _losses(
            model, pgd(model, images, labels, 0.1, generator=generator, **options), labels
        )

    once = attack(steps=10, step_size=0.025)
    thrice = attack(steps=10, step_size=0.025, restarts=3)
    assert once.mean() > clean.mean() + 0.1
    # The first start is the same, and for each image by itself the worst one is kept.
    assert (thrice >= once).all()
    assert (thrice > once).any()


def test_keeps_the_worst_point_of_each_image_not_the_last_one():
    # One pixel, loss highest where the hinge |x - 0.5| is small; a long step jumps over it.
    class Peak(nn.Module):
        def forward(self, images):
            height = -40 * (images.flatten(1) - 0.5).abs()
            return torch.cat([torch.zeros_like(height), height], 1)

    image, label = torch.tensor([[[[0.42]]]]), torch.tensor([0])
    options = {"step_size": 0.09, "random_start": False}
    one, two, three = (
        pgd(Peak(), image, label, 0.2, steps=steps, **options).item() for steps in (1, 2, 3)
    )
    assert one == pytest.approx(0.51)
    assert two == pytest.approx(0.51)  # the second step leads back to 0.42
    assert three == pytest.approx(0.51)


def test_linear_model_is_broken_at_the_minimal_eps_and_not_below():
    # logits (w·x + b, 0), class 0: the distance to the boundary is (w·x + b)/‖w‖₁, by Hölder.
    torch.manual_seed(3)
    weight = torch.randn(12, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([weight, torch.zeros(12)]))
        model[1].bias.zero_()
    # Far from 0 and 1, so that the box does not matter.
    image = 0.5 + 0.1 * (torch.rand(1, 3, 2, 2, dtype=torch.float64) - 0.5)
    margin = (image.flatten(1) @ weight).item() + 0.3
    with torch.no_grad():
        model[1].bias[0] = margin - (image.flatten(1) @ weight).item()
    smallest = margin / weight.abs().sum().item()
    for eps, broken in ((0.99 * smallest, False), (1.01 * smallest, True)):
        for attacked in (
            fgsm(model, image, torch.tensor([0]), eps),
            pgd(model, image, torch.tensor([0]), eps, steps=8, step_size=eps / 2),
        ):
            assert bool(model(attacked).argmax(1) == 1) == broken
            # The worst point is x - eps·sign(w), whatever the start.
            expected = image - eps * weight.sign().view(1, 3, 2, 2)
            torch.testing.assert_close(attacked, expected, rtol=0, atol=1e-12)


def test_the_last_point_costs_one_forward_less_and_takes_soft_labels(model, batch):
    images, labels = batch
    model.eval()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(0))

    def attack(labels, **options):
        generator = torch.Generator().manual_seed(0)
        calls.clear()
        options = {"steps": 3, "step_size": 0.04, "generator": generator, **options}
        return pgd(model, images, labels, 0.1, **options)

    last = attack(labels, keep="last")
    assert len(calls) == 3
    one_hot = torch.nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(attack(one_hot, keep="last"), last, rtol=0, atol=1e-6)
    # Written out: three steps from the same start, none of them judged.
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    lower, upper = (images - 0.1).clamp(0, 1), (images + 0.1).clamp(0, 1)
    point = (images + 0.1 * (2 * noise - 1)).clamp(lower, upper)
    for _ in range(3):
        point.requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(model(point), labels), point)
        point = (point.detach() + 0.04 * gradient.sign()).clamp(lower, upper)
    torch.testing.assert_close(last, point, rtol=0, atol=1e-6)
    soft = torch.rand(64, 3).softmax(1)
    worst = attack(soft, restarts=2)
    assert len(calls) == 8
    assert (_losses(model, worst, soft) >= _losses(model, attack(soft), soft)).all()


def test_fgsm_is_its_formula(model, batch):
    images, labels = batch
    model.eval()
    clean = images.clone().requires_grad_()
    cross_entropy(model(clean), labels).backward()
    expected = (images + 0.03 * clean.grad.sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(model, images, labels, 0.03), expected, rtol=0, atol=1e-6)


def test_leaves_the_model_as_it_was(model, batch):
    model.train()
    model[4].eval()
    model[1].bias.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    required = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    images = batch[0].clone()
    pgd(model, *batch, 0.1, steps=2, step_size=0.1)
    assert torch.equal(batch[0], images)
    assert all((parameter.grad == 7).all() for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert [module.training for module in model.modules()] == modes

    class Broken(nn.Linear):
        def forward(self, images):
            raise RuntimeError("on purpose")

    broken = Broken(2, 2)
    with pytest.raises(RuntimeError, match="on purpose"):
        pgd(broken, *batch, 0.1, steps=2, step_size=0.1)
    assert broken.training
    assert broken.weight.requires_grad


def test_works_without_grad_mode_and_repeats_with_the_same_generator(model, batch):
    def attack(seed):
        generator = torch.Generator().manual_seed(seed)
        return pgd(model, *batch, 0.1, steps=2, step_size=0.1, generator=generator)

    with torch.no_grad():
        assert torch.equal(attack(0), attack(0))
        assert not torch.equal(attack(0), attack(1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"restarts": 0},
        {"eps": -0.1},
        {"keep": "all"},
        {"keep": "last", "restarts": 2},
    ],
)
def test_nonsense_is_refused(model, batch, wrong):
    options = {"eps": 0.1, "steps": 1, "step_size": 0.1, **wrong}
    with pytest.raises(ValueError, match=r"at least|keep must"):
        pgd(model, *batch, **options)
