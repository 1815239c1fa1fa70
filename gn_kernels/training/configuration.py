"""A run's settings as one YAML file: read, checked, built on each other, and written."""

from __future__ import annotations

import dataclasses
import difflib
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from gn_kernels.training.settings import DEFAULTS, InputError, Settings

_KEYS = tuple(field.name for field in dataclasses.fields(Settings))
# The one key that is no setting: the preset that the file's own keys are laid over.
_BASE = "preset"


def presets() -> tuple[str, ...]:
    """The names of the presets that come with the package."""
    folder = resources.files("gn_kernels.training") / "presets"
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir()))


def preset(name: str) -> dict[str, Any]:
    """What a preset sets, with the presets that it is built on.

    Raises:
        InputError: there is none of this name; the nearest one is told.
    """
    if name not in presets():
        near = difflib.get_close_matches(name, presets(), 1)
        hint = f": did you mean {near[0]}?" if near else f": there are {', '.join(presets())}"
        raise InputError(f"there is no preset {name!r}{hint}")
    file = resources.files("gn_kernels.training") / "presets" / f"{name}.yaml"
    return _resolved(file.read_text(encoding="utf-8"), f"the preset {name}")


def read(path: Path) -> dict[str, Any]:
    """What a configuration file sets: keys of :class:`Settings`, and ``preset`` to build on one.

    Raises:
        InputError: it can't be read, is no mapping, or has a key that no setting has; the nearest
            one is told.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the configuration {path} can't be read: {error}") from error
    return _resolved(text, str(path))


def combined(*layers: dict[str, Any]) -> Settings:
    """The settings of several layers, the later ones over the earlier, all over the defaults.

    The defaults are those of the data set that the layers come out at.
    """
    together: dict[str, Any] = {}
    for layer in layers:
        together |= layer
    defaults = DEFAULTS.get(str(together.get("dataset", "digits")), {})
    return Settings(**{**defaults, **together})


def write(path: Path, settings: Settings) -> None:
    """All settings, in their order, as :func:`read` takes them."""
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(settings).items()
    }
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _resolved(text: str, where: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{where} is not YAML: {reason}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise InputError(f"{where} must hold lines of the form key: value")
    for key in content:
        if key not in (*_KEYS, _BASE):
            near = difflib.get_close_matches(str(key).replace("-", "_"), _KEYS, 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise InputError(f"{where} sets {key!r}, which is no setting{hint}")
    content = {key: _number(key, value) for key, value in content.items()}
    base = content.pop(_BASE, None)
    return {**(preset(str(base)) if base is not None else {}), **content}


def _number(key: str, value: Any) -> Any:
    """YAML takes 1e-5, without a dot, for text."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Settings)}
    if isinstance(value, str) and kinds.get(key, "").startswith("float"):
        try:
            return float(value)
        except ValueError:
            return value
    return value
