"""Errors for rows that cannot be used."""

from dataclasses import dataclass


class DataError(ValueError):
    """Rows that cannot be used. The message says what is wrong and what to do."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on: where it is, and why."""

    origin: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"
