"""The errors a user can meet; each message is one line that names the thing, its value and the way out."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import takewhile

OR_YOUR_OWN = ", and module:Class of your own"


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


class SecureRefused(UpdateRefused):
    """A step of secure aggregation that a client does not take, or an answer that none is made of."""


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


def unknown_name(key: str, name: object, accepted: Collection[str], more: str = "") -> ConfigError:
    """One-line refusal of a name that is not listed, with the listed one that is most like it.

    Args:
        key: of the configuration.
        name: its value.
        accepted: the listed names.
        more: what is accepted besides.

    >>> print(unknown_name("strategy.name", "flor", ["flora", "ffa"]))
    strategy.name = 'flor' (did you mean flora?): accepted are flora, ffa
    """
    near = get_close_matches(str(name), accepted, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return ConfigError(f"{key} = {name!r}{hint}: accepted are {', '.join(accepted)}{more}")


def shown(names: Sequence[str]) -> str:
    """Names in a message, the first twenty.

    >>> shown(["a", "b"])
    "'a', 'b'"
    """
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(map(repr, names[:20])) + more


def shown_apart(ours: Sequence[str], theirs: Sequence[str]) -> tuple[str, str]:
    """Two unlike lists of names in a message, where they are long from the first that differs.

    >>> shown_apart(["a", "b"], ["a"])
    ("'a', 'b'", "'a'")
    >>> many = [f"n{number}" for number in range(30)]
    >>> shown_apart(many, [*many[:28], "x"])
    ("from number 29 on 'n28', 'n29'", "from number 29 on 'x'")
    """
    if max(len(ours), len(theirs)) <= 20:
        return shown(ours), shown(theirs)
    pairs = zip(ours, theirs, strict=False)
    alike = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    tails = [shown(names[alike:]) or "nothing more" for names in (ours, theirs)]
    return f"from number {alike + 1} on {tails[0]}", f"from number {alike + 1} on {tails[1]}"


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


WRONG_PLACE = frozenset(
    {
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
        errno.ELOOP, errno.ENAMETOOLONG,
    }
)  # fmt: skip
"""What the system answers where another place would do; anything else (a full disk) went wrong on the way."""


def of_the_system(error: OSError) -> FedLoraError:
    """An error of the operating system as one of ours: its file, and the reason in the system's words.

    >>> str(of_the_system(OSError(errno.ENOSPC, "No space left on device", "runs/a/rounds.jsonl")))
    'runs/a/rounds.jsonl: No space left on device; what was written before is kept'
    """
    if error.errno is None:
        return RunFailed(named_line(error))
    place = "" if error.filename is None else f"{error.filename}: "
    reason = error.strerror or named_line(error)
    if error.errno in WRONG_PLACE:
        return ConfigError(f"{place}{reason}")
    return RunFailed(f"{place}{reason}; what was written before is kept")


@contextmanager
def system_errors_in_words() -> Iterator[None]:
    """Turn what the operating system refuses inside into errors of ours, see `of_the_system`.

    A closed pipe stays what it is: whoever read our output has had enough.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise of_the_system(error) from error
