"""How a setting is declared, and what a declaration says to those who tell of settings.

A declaration is the one place where a key stands: config.toml, the man page, ``check-config`` and a reload
take from it what they say and do. The declarations themselves are in sections.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

_IS_LIVE = "live"


@dataclass(frozen=True)
class Declared:
    """One setting. ``example`` is shown where there is no default that could be."""

    section: str
    name: str
    default: Any
    text: str
    example: Any
    is_live: bool

    @property
    def key(self) -> str:
        """``models.root``"""
        return f"{self.section}.{self.name}"

    def of(self, settings: BaseModel) -> Any:
        """Its value in ``settings``."""
        return getattr(getattr(settings, self.section), self.name)


def setting(default: Any, text: str, *, live: bool, example: Any = None, **limits: Any) -> Any:
    """A key of a section.

    Args:
        text: what the operator reads of it, in whole sentences.
        live: whether a reload applies it. Who uses it then has to ask for it each time, see current.py.
        example: for a key that is not set by default.
        limits: as pydantic's ``Field`` has them: ``gt``, ``ge``, ``le``.
    """
    return Field(
        default,
        description=text,
        examples=None if example is None else [example],
        json_schema_extra={_IS_LIVE: live},
        **limits,
    )


def declared_in(settings: type[BaseModel]) -> Iterator[Declared]:
    """Every setting of every section, in the order in which they are declared."""
    for section, holder in settings.model_fields.items():
        for name, field in type(holder.default).model_fields.items():
            marks = field.json_schema_extra
            assert isinstance(marks, dict), f"{section}.{name} is not declared with setting()"
            yield Declared(
                section=section,
                name=name,
                default=field.default,
                text=field.description or "",
                example=next(iter(field.examples or ()), None),
                is_live=bool(marks[_IS_LIVE]),
            )
