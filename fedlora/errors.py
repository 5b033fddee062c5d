"""The errors a user can meet; each message is one line that names the thing, its value and the way out."""

from __future__ import annotations


class FedLoraError(Exception):
    """Base of every error that fedlora raises on purpose."""


class ConfigError(FedLoraError, ValueError):
    """A request that cannot be carried out as written (exit code 2)."""


class NotApplicable(ConfigError):
    """A combination that a strategy or a mode excludes by its nature; a study lists it and goes on."""


class FactorShapeError(FedLoraError, ValueError):
    """LoRA factors whose shapes, ranks or modules do not fit together."""


class UpdateRefused(FedLoraError, ValueError):
    """A client's reply that must not be aggregated; the round goes on without it."""


class RunFailed(FedLoraError, RuntimeError):
    """A run that had to stop; what it wrote before is kept (exit code 1)."""


class AssetError(FedLoraError, RuntimeError):
    """A model or dataset that could not be fetched or does not have its pinned hash."""


class BudgetExceeded(FedLoraError):
    """A client that may not train again without breaking its privacy budget."""


class OwnDataRefused(ConfigError):
    """A node's own examples that cannot be used; the message is for their owner.

    Attributes:
        told: what others may know of it.
    """

    def __init__(self, message: str, told: str) -> None:
        super().__init__(message)
        self.told = told


class LedgerRefused(ConfigError):
    """A privacy ledger that cannot be relied upon, or data that it must not be opened for."""


def first_line(error: object, otherwise: str = "") -> str:
    r"""The first line of an error's message (or of a text); its kind, or ``otherwise``, if it says nothing.

    >>> first_line(ValueError("a\nb")), first_line(KeyError()), first_line("", "no answer")
    ('a', 'KeyError', 'no answer')
    """
    return next(iter(str(error).strip().splitlines()), otherwise or type(error).__name__)


def named_line(error: BaseException) -> str:
    r"""The kind of an error and its first line, for errors that nobody foresaw.

    >>> named_line(ValueError("a\nb"))
    'ValueError: a'
    """
    return f"{type(error).__name__}: {first_line(error, 'no message')}"
