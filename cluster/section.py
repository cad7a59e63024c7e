"""Parts of configuration files: frozen, and unknown keys fail with the nearest right name."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.errors import ConfigError

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring = 2, 80


class Section(BaseModel):
    """A part of a configuration file: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


SectionT = TypeVar("SectionT", bound=Section)


def parse_section(section: type[SectionT], values: Any) -> SectionT:
    """Validates ``values`` (a mapping as read from YAML) as one ``section``.

    Raises:
        ConfigError: naming the key's dotted path, and for an unknown key the nearest right one.
    """
    if not isinstance(values, dict):
        raise ConfigError("args", f"must be a mapping, got {type(values).__name__}")
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise _as_config_error(section, error) from None


def parse_yaml(name: str, text: str | bytes) -> Any:
    """The document of a YAML file.

    Args:
        name: of the file, for errors, which quote nothing of it.

    Raises:
        ConfigError: it is not one YAML document, or nested too deeply.
    """
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ConfigError(name, f"is not YAML: {error.problem}{where}") from None
    except RecursionError:
        raise ConfigError(name, "is nested too deeply") from None
    except Exception:  # dates, numbers and characters that there are not: PyYAML raises what comes
        raise ConfigError(name, "is not YAML") from None


def resolve_path(model: str, base_dir: Path) -> str:
    """``model`` as a path beside the file that named it where there is one, else as it is."""
    candidate = base_dir / model
    return str(candidate.resolve()) if candidate.exists() else model


def resolve_files(section: SectionT, base_dir: Path) -> SectionT:
    """``section`` with ``resolve_path`` of every key that ends with ``_file``, at any depth."""
    changed: dict[str, Any] = {}
    for name, value in section:
        if isinstance(value, Section):
            changed[name] = resolve_files(value, base_dir)
        elif name.endswith("_file") and value is not None:
            changed[name] = resolve_path(value, base_dir)
    # Where nothing changes it is the same section, whose unset keys stay unset.
    return section.model_copy(update=changed) if changed else section


def _as_config_error(root: type[BaseModel], error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location) or "args"
    if first["type"] == "extra_forbidden":
        return ConfigError(key, "unknown key", _known_keys(root, location[:-1]))
    if first["type"] == "missing":
        return ConfigError(key, "is required")
    message = first["msg"].removeprefix("Value error, ")
    if first["loc"]:
        # Shortened: aliases of YAML make small files of endless values.
        message = f"{message}, got {_SHORT.repr(first['input'])}"
    return ConfigError(key, message)


def _known_keys(model: Any, path: list[str]) -> list[str]:
    for part in path:
        if part not in model.model_fields:
            continue  # the index of a list
        annotation = model.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)
