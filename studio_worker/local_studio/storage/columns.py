"""The kinds of columns that mean the same in SQLite and in PostgreSQL. Migrations use them too."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import REAL, BigInteger, Integer, Text
from sqlalchemy.dialects.postgresql import DOUBLE_PRECISION
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine


class Words(TypeDecorator[str]):
    """Text in the order of its characters, on any server. PostgreSQL knows no NUL: it is replaced."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(Text(collation="C") if dialect.name == "postgresql" else Text())

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is not None and dialect.name == "postgresql" and "\0" in value:
            return value.replace("\0", "\N{REPLACEMENT CHARACTER}")
        return value


class Json(TypeDecorator[Any]):
    """JSON as it was written, as text: PostgreSQL's own type refuses what protocol and SQLite allow (NUL)."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, _dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, _dialect: Dialect) -> Any:
        if value == "{}":  # what most jobs have for rejections, and many are looked at for each offer
            return {}
        return None if value is None else json.loads(value)


SECONDS: TypeEngine[float] = REAL().with_variant(DOUBLE_PRECISION(), "postgresql")
"""PostgreSQL's REAL has seven digits: a Unix time would be off by minutes."""

NUMBER: TypeEngine[int] = BigInteger().with_variant(Integer(), "sqlite")
"""64 bits; in SQLite only a column of this name counts up by itself."""
