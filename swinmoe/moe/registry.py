"""Names for routers, experts and dispatchers, open to other packages.

`MoEConfig` speaks of parts by name. A package adds its own by decorating a class before it builds a model:

    @register_expert("relu2")
    class SquaredRelu(Experts): ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from swinmoe.errors import ConfigError, did_you_mean

Part = TypeVar("Part", bound=type)


class Registry(Generic[Part]):
    """Classes of one kind by name."""

    def __init__(self, kind: str, config_key: str) -> None:
        self.kind = kind
        self.config_key = config_key
        self._parts: dict[str, Part] = {}

    def register(self, name: str) -> Callable[[Part], Part]:
        """A class decorator. `ConfigError` if another class has the name already (re-importing one module is fine)."""

        def add(part: Part) -> Part:
            known = self._parts.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (part.__module__, part.__qualname__):
                raise ConfigError(
                    f"{self.kind} {name!r} is registered already, by {known.__module__}.{known.__qualname__}; "
                    "choose another name"
                )
            self._parts[name] = part
            return part

        return add

    def get(self, name: str) -> Part:
        """The class registered as `name`; `ConfigError` with the closest names if there is none."""
        if name not in self._parts:
            raise ConfigError(
                f"{self.config_key}={name!r} is unknown; use one of {self.names()}{did_you_mean(name, self._parts)}"
            )
        return self._parts[name]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._parts)


ROUTERS: Registry[Any] = Registry("router", "moe.router.type")
EXPERTS: Registry[Any] = Registry("expert", "moe.experts.type")
DISPATCHERS: Registry[Any] = Registry("dispatcher", "moe.dispatcher")

register_router = ROUTERS.register
register_expert = EXPERTS.register
register_dispatcher = DISPATCHERS.register
