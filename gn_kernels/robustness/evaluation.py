"""Accuracy on images as they are and in the worst case over attacks and radii."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from gn_kernels.robustness import autoattack
from gn_kernels.robustness.attacks import _attacked, pgd
from gn_kernels.robustness.differentiate import input_gradients
from gn_kernels.robustness.images import Images, batches, check_images, check_labels, check_logits
from gn_kernels.robustness.masking import BLACK_BOX, masking_warnings
from gn_kernels.robustness.resume import Progress, Stage, digest, generator
from gn_kernels.version import __version__

# Names that stand for several attacks.
SUITES = {"autoattack": autoattack.STANDARD, "autoattack-quick": autoattack.QUICK}
ATTACKS = ("pgd", *autoattack.ATTACKS)

# The checks for masked gradients look at this many images.
_CHECKED_IMAGES = 128


class Radius(TypedDict):
    """Accuracy at one radius.

    ``accuracy`` is the worst case over all attacks, ``after`` that over the attacks so far, in
    their order; ``standing`` says which images stand (:func:`unpack`).
    """

    eps_255: float
    accuracy: float
    after: dict[str, float]
    standing: str


class Evaluation(NamedTuple):
    """Figures of a model on ``images`` images, and what they depend on.

    Attributes:
        clean_accuracy: share that is classified rightly.
        robust_accuracy: share that stands all attacks at the largest radius.
        gradient_norm_l1: mean L1 norm of the cross-entropy's gradient at the clean images, per
            unit of pixels in [0, 1].
        eps_255: the largest radius.
        step_255: step of PGD there.
        sweep: for each radius, from the smallest.
        correct: which images are classified rightly (:func:`unpack`).
        warnings: signs of masked gradients, a sentence each.
        pyautoattack: version of the package, if one of the attacks is its.
        model, data: digests of the weights, and of the first and last image with their labels.
        seconds: of all attacks and passes, interruptions left out.
    """

    images: int
    clean_accuracy: float
    robust_accuracy: float
    gradient_norm_l1: float
    eps_255: float
    attacks: tuple[str, ...]
    attack_steps: int
    step_255: float
    restarts: int
    seed: int
    batch_size: int
    sweep: tuple[Radius, ...]
    correct: str
    warnings: tuple[str, ...]
    pyautoattack: str | None
    model: str
    data: str
    seconds: float


def evaluate(
    model: nn.Module,
    images: Images,
    *,
    eps_255: float | Sequence[float],
    attacks: Sequence[str] = ("pgd",),
    attack_steps: int = 20,
    restarts: int = 2,
    seed: int = 0,
    batch_size: int = 500,
    check_gradients: bool = True,
    progress_file: Path | None = None,
    observer: Callable[[Stage], None] = lambda stage: None,
) -> Evaluation:
    r"""Measure accuracy, the mean gradient norm, and accuracy in the worst case over attacks.

    An image counts as robust at ε if it is classified rightly and no attack with a radius up to ε
    has broken it: later attacks and larger radii see only the images that still stand, and
    accuracy can only fall with ε. The step of PGD is 2.5·ε/steps: it can cross the ball, and still
    settle. The same images, weights, options and batch size give the same figures.

    Args:
        model: pixels in [0, 1] to logits. Left as it was.
        images: on the model's device.
        eps_255: radius of the L∞ ball, in 1/255; several for a sweep.
        attacks: names of ``ATTACKS``, or ``SUITES`` of them, in their order: ``"autoattack"``, the
            standard version, needs the extra ``eval`` and at least 4 classes.
        attack_steps: of PGD.
        restarts: random starts of PGD, of which the worst counts.
        seed: of the random starts, and of AutoAttack.
        batch_size: images attacked at a time.
        check_gradients: look for masked gradients on the first 128 images (``warnings``).
        progress_file: holds what is done; a second call goes on there. The caller deletes it
            once the results stand elsewhere.
        observer: called after each batch.

    Raises:
        ValueError: no images; a value out of its range; images outside [0, 1]; labels that the
            model has no class for; logits that are NaN; too few classes for an attack; a
            ``progress_file`` of another evaluation.
        NotDifferentiableError: the model has no gradient at its pixels.
        ModuleNotFoundError: an attack needs pyautoattack, which is not installed.

    Source: the ensemble, Croce and Hein, https://arxiv.org/abs/2003.01690.
    """
    radii = sorted({float(eps_255)} if isinstance(eps_255, (int, float)) else set(eps_255))
    names = _expand(attacks)
    if len(images) == 0:
        raise ValueError("there must be at least one image to evaluate on")
    if not radii or radii[0] < 0 or not names or min(attack_steps, restarts, batch_size) < 1:
        raise ValueError(
            "attacks and radii must not be empty, radii at least 0, and attack_steps, restarts and "
            f"batch_size at least 1, but got {names}, {radii}, {attack_steps}, {restarts} and "
            f"{batch_size}"
        )
    external = [name for name in names if name != "pgd"]
    package = None
    if external:
        import_module("pyautoattack")  # what is missing is told before the work, not after it
        package = version("pyautoattack")
    with _attacked(model):
        ends = images[torch.tensor([0, len(images) - 1])]
        identity: dict[str, Any] = {
            "model": digest(model.state_dict().items()),
            "data": digest(zip(("images", "labels"), ends, strict=True)),
            "images": len(images),
            "eps_255": radii,
            "attacks": names,
            "attack_steps": attack_steps,
            "restarts": restarts,
            "seed": seed,
            "batch_size": batch_size,
            "gn_kernels": __version__,
            "torch": str(torch.__version__),
            "pyautoattack": package,
        }
        run = _Run(model, images, identity, progress_file, observer)
        clean = run.clean()
        for name in external:
            autoattack.check_classes(name, clean["classes"])
        standing, sweep = clean["correct"], []
        for eps in radii:
            figures, standing = run.radius(eps, names, standing)
            sweep.append(figures)
        warnings = run.warnings(radii[-1]) if check_gradients else []
    correct = clean["correct"]
    return Evaluation(
        images=len(images),
        clean_accuracy=correct.double().mean().item(),
        robust_accuracy=sweep[-1]["accuracy"],
        gradient_norm_l1=clean["norm"] / len(images),
        eps_255=radii[-1],
        attacks=tuple(names),
        attack_steps=attack_steps,
        step_255=2.5 * radii[-1] / attack_steps,
        restarts=restarts,
        seed=seed,
        batch_size=batch_size,
        sweep=tuple(sweep),
        correct=pack(correct),
        warnings=tuple(warnings),
        pyautoattack=package,
        model=identity["model"],
        data=identity["data"],
        seconds=run.seconds(),
    )


class _Run:
    """One evaluation and what of it is done."""

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        identity: dict[str, Any],
        path: Path | None,
        observer: Callable[[Stage], None],
    ) -> None:
        self.model, self.images, self.identity, self.observer = model, images, identity, observer
        self.progress = Progress(path, identity)
        self.content = self.progress.content
        self._last = time.perf_counter()

    def seconds(self) -> float:
        """So far, those of earlier calls included."""
        now = time.perf_counter()
        self.content["seconds"] = self.content.get("seconds", 0.0) + now - self._last
        self._last = now
        return float(self.content["seconds"])

    def _save(self) -> None:
        self.seconds()
        self.progress.save()

    def _step(self, name: str, done: int, total: int, standing: Tensor) -> None:
        self._save()
        self.observer(Stage(name, done, total, f"{int(standing.sum())} stand"))

    def clean(self) -> dict[str, Any]:
        """Which images are classified rightly, and the sum of the gradient norms."""
        count, size = len(self.images), self.identity["batch_size"]
        found: dict[str, Any] = self.content.setdefault(
            "clean", {"correct": torch.zeros(count, dtype=torch.bool), "norm": 0.0, "done": 0}
        )
        for indices in batches(torch.arange(found["done"], count), size):
            pixels, labels = self.images[indices]
            check_images(pixels, labels)
            if "classes" not in found:
                with torch.no_grad():
                    found["classes"] = self.model(pixels[:1]).shape[-1]
            check_labels(labels, found["classes"])  # the loss would crash, on a GPU for good
            gradients, _, logits = input_gradients(self.model, pixels, labels)
            check_logits(logits)
            found["correct"][indices] = (logits.argmax(1) == labels).cpu()
            found["norm"] += gradients.double().abs().sum().item()
            found["done"] += len(indices)
            self._step("clean", found["done"], count, found["correct"])
        return found

    def radius(
        self, eps_255: float, names: Sequence[str], standing: Tensor
    ) -> tuple[Radius, Tensor]:
        """All attacks at one radius, on what the smaller radii left standing."""
        after = {}
        for name in names:
            # Clean accuracy needs no attack.
            if eps_255 > 0:
                standing = self._attack(name, eps_255, standing)
            after[name] = standing.double().mean().item()
        accuracy = standing.double().mean().item()
        figures = Radius(eps_255=eps_255, accuracy=accuracy, after=after, standing=pack(standing))
        return figures, standing

    def _attack(self, name: str, eps_255: float, before: Tensor) -> Tensor:
        stage = f"{name}, eps {eps_255:g}/255"
        attacked = before.nonzero().flatten()
        found = self.content.setdefault(stage, {"standing": before.clone(), "done": 0})
        standing: Tensor = found["standing"]
        for indices in batches(attacked[found["done"] :], self.identity["batch_size"]):
            pixels, labels = self.images[indices]
            position = found["done"] // self.identity["batch_size"]
            adversarial = self._adversarial(name, pixels, labels, eps_255, position)
            with torch.no_grad():
                logits = self.model(adversarial)
            check_logits(logits)
            standing[indices] = (logits.argmax(1) == labels).cpu()
            found["done"] += len(indices)
            self._step(stage, found["done"], len(attacked), standing)
        return standing

    def _adversarial(
        self, name: str, pixels: Tensor, labels: Tensor, eps_255: float, position: int
    ) -> Tensor:
        eps, seed = eps_255 / 255, self.identity["seed"]
        if name != "pgd":
            return autoattack.attack(name, self.model, pixels, labels, eps, seed)
        return pgd(
            self.model,
            pixels,
            labels,
            eps,
            steps=self.identity["attack_steps"],
            step_size=2.5 * eps / self.identity["attack_steps"],
            restarts=self.identity["restarts"],
            generator=generator(seed, position),
        )

    def warnings(self, eps_255: float) -> list[str]:
        """Signs of masked gradients, in the sweep and on some of the images."""
        correct: Tensor = self.content["clean"]["correct"]
        found = [
            f"black-box beats white-box: Square, which sees no gradient, broke another "
            f"{broken:.1%} of the images at eps {radius:g}/255"
            for radius in self.identity["eps_255"]
            if (broken := self._broken_by_square(radius)) > BLACK_BOX
        ]
        chosen = correct.nonzero().flatten()[:_CHECKED_IMAGES]
        if len(chosen):
            pixels, labels = self.images[chosen]
            found += masking_warnings(
                self.model,
                pixels,
                labels,
                eps_255 / 255,
                self.identity["attack_steps"],
                generator(self.identity["seed"], 0),
            )
        return found

    def _broken_by_square(self, eps_255: float) -> float:
        names, found = self.identity["attacks"], f"square, eps {eps_255:g}/255"
        if found not in self.content or names.index("square") == 0:
            return 0.0
        earlier = self.content[f"{names[names.index('square') - 1]}, eps {eps_255:g}/255"]
        broken = earlier["standing"].sum() - self.content[found]["standing"].sum()
        return int(broken) / len(self.images)


def _expand(attacks: Sequence[str]) -> list[str]:
    names: list[str] = []
    for attack in attacks:
        if attack not in ATTACKS and attack not in SUITES:
            raise ValueError(
                f"attacks must be among {', '.join((*SUITES, *ATTACKS))}, but got {attack!r}"
            )
        names += [name for name in SUITES.get(attack, (attack,)) if name not in names]
    return names


def pack(flags: Tensor) -> str:
    """Booleans as hexadecimal digits, eight a byte, the first in the highest bit."""
    return np.packbits(flags.numpy()).tobytes().hex()


def unpack(digits: str, count: int) -> Tensor:
    """The ``count`` booleans of :func:`pack`."""
    packed = np.frombuffer(bytes.fromhex(digits), np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=count).astype(bool))
