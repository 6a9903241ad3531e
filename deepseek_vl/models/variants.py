"""Choosing a tower's published variant from a table, with fields overridden by the config."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")


def select_variant(table: Mapping[str, Row], model_name: str, **overrides: Any) -> Row:
    """The row `model_name` of `table`, a dict of dataclass instances, with the fields in `overrides` replaced.

    Raises:
        ValueError: for a name that is not in the table or an override that is not a field of its rows.
    """
    if model_name not in table:
        raise ValueError(f"Unknown vision tower {model_name!r}; known are {', '.join(table)}.")
    row = table[model_name]
    fields = [f.name for f in dataclasses.fields(row)]
    unknown = sorted(set(overrides) - set(fields))
    if unknown:
        raise ValueError(
            f"Unknown key {', '.join(map(repr, unknown))} for vision tower {model_name!r}; "
            f"it takes {', '.join(fields)}."
        )
    return dataclasses.replace(row, **overrides)
