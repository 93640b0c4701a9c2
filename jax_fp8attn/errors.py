"""The two errors that users meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class InvalidInputError(ValueError):
    """The call itself is wrong: a rank, shape, dtype, option or combination. Raised while tracing."""


class UnsupportedError(RuntimeError):
    """No implementation that the caller allows can serve a valid call.

    ``reasons`` maps each implementation that was asked to the reasons why it cannot.
    """

    def __init__(self, message: str, reasons: Mapping[str, Sequence[str]] | None = None) -> None:
        self.reasons = {name: tuple(why) for name, why in (reasons or {}).items()}
        lines = [f"  {name}: {why}" for name, whys in self.reasons.items() for why in whys]
        super().__init__("\n".join([message, *lines]))
