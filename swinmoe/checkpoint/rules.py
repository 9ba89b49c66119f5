"""How another library's names and shapes become ours, and back: one table of rules per layout.

A rule joins names on one side to names on the other by templates, and tensors by two functions:

    Rule("layers.{i+1}.downsample.{rest}", "layers.{i}.downsample.{rest}")

Our side has the names that a whole model has in memory, experts stacked (`swinmoe.checkpoint.naming`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from swinmoe.errors import CheckpointError

Values = dict[str, str]
Change = Callable[..., Tensor | tuple[Tensor, ...]]

_HOLE = re.compile(r"\{(?P<times>\d*)(?P<name>[a-z]+)(?:\+(?P<plus>\d+))?\}")


@dataclass(frozen=True)
class Template:
    """A family of names. `{i}` is a number, `{2i+1}` one that it can be worked out from; a longer word such as `{rest}`
    is any text, `{prefix}` also none (and ends at a dot)."""

    text: str

    @cached_property
    def _parts(self) -> tuple[re.Pattern[str], list[re.Match[str]]]:
        holes = list(_HOLE.finditer(self.text))
        pattern, end = "", 0
        for n, hole in enumerate(holes):
            kind = r"\d+" if len(hole["name"]) == 1 else r"(?:.*\.)?" if hole["name"] == "prefix" else ".+"
            pattern += re.escape(self.text[end : hole.start()]) + f"(?P<h{n}>{kind})"
            end = hole.end()
        return re.compile(pattern + re.escape(self.text[end:])), holes

    def match(self, name: str) -> Values | None:
        """What stands in the holes of `name`; None for a name of another family."""
        pattern, holes = self._parts
        found = pattern.fullmatch(name)
        if found is None:
            return None
        values: Values = {}
        for n, hole in enumerate(holes):
            text = found[f"h{n}"]
            if len(hole["name"]) == 1:
                number, remainder = divmod(int(text) - int(hole["plus"] or 0), int(hole["times"] or 1))
                if remainder or number < 0:
                    return None
                text = str(number)
            if values.setdefault(hole["name"], text) != text:
                return None
        return values

    def fill(self, values: Mapping[str, str]) -> str:
        """The member of the family with these values."""

        def put(hole: re.Match[str]) -> str:
            value = values[hole["name"]]
            if len(hole["name"]) > 1:
                return value
            return str(int(value) * int(hole["times"] or 1) + int(hole["plus"] or 0))

        return _HOLE.sub(put, self.text)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _first(*tensors: Tensor) -> Tensor:
    return tensors[0]


@dataclass(frozen=True)
class Rule:
    """`read` takes the tensors of the foreign names and gives those of ours; `write` goes the other way."""

    foreign: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    read: Change = _as_it_is
    write: Change = _as_it_is

    @cached_property
    def foreign_templates(self) -> tuple[Template, ...]:
        return _templates(self.foreign)

    @cached_property
    def our_templates(self) -> tuple[Template, ...]:
        return _templates(self.ours)


@dataclass(frozen=True)
class Layout:
    """All about one library's files.

    `derived` are patterns of what follows from the configuration (indices, masks): it is left where it is.
    """

    name: str
    rules: Sequence[Rule]
    derived: tuple[str, ...] = field(default=())

    def read(self, source: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Foreign tensors -> ours by name, and the foreign names that no rule knows.

        Raises:
            CheckpointError: a part of a joint tensor is missing, or two names mean the same tensor.
        """
        kept = {name: tensor for name, tensor in source.items() if not self.is_derived(name)}
        sides = [(rule.foreign_templates, rule.our_templates, rule.read) for rule in self.rules]
        return _apply(self.name, sides, kept)

    def write(self, named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Our tensors -> foreign ones by name, and our names that have no counterpart there."""
        sides = [(rule.our_templates, rule.foreign_templates, rule.write) for rule in self.rules]
        return _apply(self.name, sides, named)

    def aside(self, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The derived tensors under names of ours, for what they tell about windows and image."""
        sides = [(rule.foreign_templates, rule.our_templates, _first) for rule in self.rules]
        return _apply(self.name, sides, {name: t for name, t in source.items() if self.is_derived(name)})[0]

    def is_derived(self, name: str) -> bool:
        """True for an index, a mask or whatever else follows from the configuration."""
        return any(re.fullmatch(pattern, name) for pattern in self.derived)


def rename(pairs: Iterable[tuple[str, str]]) -> tuple[Rule, ...]:
    """Rules that change names only."""
    return tuple(Rule(foreign, ours) for foreign, ours in pairs)


Side = tuple[tuple[Template, ...], tuple[Template, ...], Change]


def _apply(layout: str, sides: Sequence[Side], source: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    out: dict[str, Tensor] = {}
    done: set[str] = set()
    unknown: list[str] = []
    for name in source:
        if name in done:
            continue
        found = _find(sides, name)
        if found is None:
            unknown.append(name)
            continue
        (inputs, outputs, change), values = found
        partners = [template.fill(values) for template in inputs]
        missing = [partner for partner in partners if partner not in source]
        if missing:
            raise CheckpointError(
                f"{name!r} of layout {layout} needs {missing} beside it, which the source lacks; the file is "
                "incomplete: get it whole"
            )
        done.update(partners)
        made = change(*(source[partner] for partner in partners))
        for template, tensor in zip(outputs, (made,) if isinstance(made, Tensor) else made, strict=True):
            target = template.fill(values)
            if target in out:
                raise CheckpointError(
                    f"{name!r} and another tensor of layout {layout} both mean {target!r}; remove one from the file"
                )
            out[target] = tensor
    return out, unknown


def _find(sides: Sequence[Side], name: str) -> tuple[Side, Values] | None:
    """The first rule that knows `name`."""
    for side in sides:
        for template in side[0]:
            values = template.match(name)
            if values is not None:
                return side, values
    return None


def _templates(texts: str | tuple[str, ...]) -> tuple[Template, ...]:
    return tuple(Template(text) for text in ((texts,) if isinstance(texts, str) else texts))
