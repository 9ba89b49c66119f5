"""Strict YAML in and out: an unknown key is an error with a suggestion, and a config is resolved once."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from swinmoe.config.presets import preset_values
from swinmoe.config.run import CompareConfig, RunConfig
from swinmoe.errors import ConfigError, did_you_mean

Config = TypeVar("Config")
Tree = dict[str, Any]

COMPARISON_KEYS = frozenset({"arms", "match", "base"})
RUN_KEYS = frozenset(f.name for f in fields(RunConfig)) - {f.name for f in fields(CompareConfig)}


def _few(names: Sequence[str]) -> str:
    """At most eight, and how many more."""
    more = len(names) - 8
    return ", ".join(names[:8]) + (f" and {more} more" if more > 0 else "")


def read_yaml(path: Path | str) -> Tree:
    """The mapping in a YAML file; `ConfigError` if it is missing, unreadable, malformed or not a mapping.

    Where there is no such file, a config that comes with the package is meant: `configs/debug/x.yaml`.
    """
    path = _shipped(Path(path))
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.yaml"))[:8]
        raise ConfigError(
            f"config file {str(path)!r} is a folder; give a YAML file{f' in it: {inside}' * bool(inside)}"
        )
    if not path.exists():
        folder = path.parent if path.parent.is_dir() else None
        near = sorted(p.name for p in folder.glob("*.yaml")) if folder else []
        hint = did_you_mean(path.name, near) or (f"; that folder has {_few(near)}" if near else "")
        raise ConfigError(f"config file {str(path)!r} does not exist{hint}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {str(path)!r} is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(
            f"config file {str(path)!r} cannot be read: {error.strerror}; give a readable file"
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date but is none
        raise ConfigError(f"config file {str(path)!r} is not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {str(path)!r} holds a {type(tree).__name__}; a mapping of keys is needed")
    return tree


def _shipped(path: Path) -> Path:
    """`path`, or what the package brings under that name: in a wheel inside it, in a clone beside it."""
    if path.exists() or path.is_absolute():
        return path
    package = Path(__file__).parents[1]
    for configs in (package / "_configs", package.parent / "configs"):
        inside = configs / path.relative_to("configs") if path.parts[:1] == ("configs",) else configs / path
        if inside.is_file():
            return inside
    return path


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """`base` with `over` laid on top: mappings merge key by key, everything else (null too) replaces."""
    out = dict(base)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return out


def parse_overrides(items: Iterable[str]) -> Tree:
    """`["optim.base_lr=1e-3", "model.moe=null"]` as a nested mapping; values are YAML."""
    tree: Tree = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {item!r} is not of the form key=value, e.g. optim.base_lr=1e-3")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"override {item!r}: the value is not valid YAML ({error})") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = merge(tree, value)
    return tree


def build(kind: type[Config], tree: Mapping[str, Any]) -> Config:
    """A `kind` from plain values: presets expanded, keys checked with suggestions, types checked and coerced.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or settings that contradict each other.
    """
    values = _checked(kind, _expand_presets(kind, tree), path="")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def load(
    kind: type[Config],
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    prepare: Callable[[Tree], Tree] | None = None,
) -> Config:
    """A `kind` from a YAML file with `key=value` overrides laid on top, and then changed by `prepare`.

    Raises:
        ConfigError: as `build`; or the file is meant for the other command, or `resume` names no checkpoint.
    """
    tree = read_yaml(path)
    _check_command(kind, tree, path)
    tree = merge(tree, parse_overrides(overrides))
    config = build(kind, tree if prepare is None else prepare(tree))
    if isinstance(config, RunConfig | CompareConfig):
        _check_resume(config.resume)
    return config


def to_tree(config: Any) -> Tree:
    """A config as plain values that `build` accepts and YAML can hold (tuples become lists)."""
    tree: Tree = _plain(asdict(config))
    return tree


def dump(config: Any) -> str:
    """A config as YAML text, fully resolved."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, default_flow_style=None, width=110)


def with_overrides(config: Config, over: Mapping[str, Any]) -> Config:
    """A config of the same kind with `over` merged in and everything checked again."""
    return build(type(config), merge(to_tree(config), over))


def run_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """`load(RunConfig, ...)`, the commonest call."""
    return load(RunConfig, path, overrides)


def _check_command(kind: type, tree: Mapping[str, Any], path: Path | str) -> None:
    """A file with arms is a comparison's; one with a run's sections and no arms is a run's."""
    if kind is RunConfig and not COMPARISON_KEYS.isdisjoint(tree):
        raise ConfigError(f"config file {str(path)!r} looks like a comparison: use swinmoe compare")
    if kind is CompareConfig and COMPARISON_KEYS.isdisjoint(tree) and not RUN_KEYS.isdisjoint(tree):
        raise ConfigError(f"config file {str(path)!r} looks like a single run: use swinmoe train")


def _check_resume(resume: str) -> None:
    if resume not in ("never", "auto") and not Path(resume).exists():
        hint = did_you_mean(resume, ("never", "auto"))
        raise ConfigError(f"resume={resume!r} is neither 'never' nor 'auto' nor a checkpoint's folder{hint}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _expand_presets(kind: type, tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """`model: {preset: NAME, ...}` becomes the preset's values with the other keys laid on top."""
    model = tree.get("model")
    if kind is RunConfig and isinstance(model, Mapping) and model.get("preset", "custom") != "custom":
        return {**tree, "model": merge(preset_values(model["preset"]), model)}
    if kind.__name__ == "ModelConfig" and tree.get("preset", "custom") != "custom":
        return merge(preset_values(tree["preset"]), tree)
    return tree


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _checked(kind: Any, value: Any, path: str) -> Any:
    """`value` with unknown keys refused and a single number allowed where a pair is meant."""
    options = _members(kind)
    section = next((o for o in options if is_dataclass(o)), None)
    if section is not None and isinstance(value, Mapping):
        hints = get_type_hints(section)
        allowed = [f.name for f in fields(section)]
        for key in value:
            if key not in allowed:
                where = f"{path}.{key}" if path else str(key)
                hint = did_you_mean(str(key), allowed) or f"; allowed: {', '.join(allowed)}"
                raise ConfigError(f"unknown config key {where!r}{hint}")
        return {k: _checked(hints[k], v, f"{path}.{k}" if path else k) for k, v in value.items()}
    mapping = next((o for o in options if get_origin(o) is dict and is_dataclass(get_args(o)[1])), None)
    if mapping is not None and isinstance(value, Mapping):
        return {k: _checked(get_args(mapping)[1], v, f"{path}.{k}") for k, v in value.items()}
    if isinstance(value, int) and not isinstance(value, bool) and tuple[int, int] in options:
        return (value, value)
    return value


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        own = item.get("ctx", {}).get("error")
        if isinstance(own, ConfigError):
            lines.append(str(own))
            continue
        where = ".".join(str(part) for part in item["loc"])
        lines.append(f"config key {where!r} was given {item['input']!r}: {item['msg'][:1].lower()}{item['msg'][1:]}")
    return "\n".join(dict.fromkeys(lines))
