"""Location of fedlora's own code (three packages in a checkout, one in a wheel), and import of a user's."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError, named_line

_HOME = Path(__file__).resolve().parents[1]
BESIDE = ("clients", "strategies")
"""Packages that lie beside ``fedlora`` in a checkout or an app bundle, and in it in a wheel."""


EXAMPLES = ("demo", "tiny", "private", "images", "novels", "federation", "audit")
"""Configurations of ``experiments/`` that a wheel has, too."""
EXTRAS = {
    "deploy": ("httpx", "uvicorn"),
    "report": ("matplotlib",),
    "offline": ("gguf", "rdata"),
}
"""What ``pip install 'fedlora[NAME]'`` installs beside the rest."""


def need_extra(extra: str, use: str) -> None:
    """Refuse a use for which the packages of an extra are missing.

    Args:
        extra: a name of `EXTRAS`.
        use: what needs it, for the message.

    Raises:
        ConfigError: one is missing.
    """
    missing = [package for package in EXTRAS[extra] if find_spec(package) is None]
    if missing:
        raise ConfigError(f"{use} needs {', '.join(missing)}: pip install 'fedlora[{extra}]'")


COMPARED = ("fedlora", "torch", "transformers", "peft", "opacus", "flwr")
"""Packages whose versions a node tells the server before round 1."""


_ENTRY = re.compile(r"[\w.-]+ [\w.+!-]{1,64}")
"""What `versions` says of a package; anything else that a node says is not looked at."""


def version_of(package: str) -> str | None:
    """The version of an installed package; None if it is not."""
    from importlib import metadata  # a quarter of the time that help takes

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> list[str]:
    """The versions here of `COMPARED`, each as ``name version``; what is not installed is left out."""
    return [f"{package} {found}" for package in COMPARED if (found := version_of(package))]


def compared(theirs: Iterable[str], ours: Iterable[str]) -> tuple[list[str], list[str]]:
    """Versions that cannot, and that can, work on one model together, one text for each that differs.

    Nothing but the same fedlora can: messages and code change with it. Of the others a version that semantic
    versioning calls incompatible cannot (another first number, or second one after a 0).

    >>> compared(["fedlora 1.0", "torch 2.5.1", "peft 0.14.0"], ["fedlora 1.0", "torch 2.6.0", "peft 0.15.1"])
    (['peft 0.14.0, here 0.15.1'], ['torch 2.5.1, here 2.6.0'])
    """
    cannot, can = list[str](), list[str]()
    here = dict(entry.split(" ", 1) for entry in ours)
    for package, other in (entry.split(" ") for entry in theirs if _ENTRY.fullmatch(entry)):
        own = here.get(package)
        if own is None or own == other:
            continue
        alike = package != "fedlora" and _series(own) == _series(other)
        (can if alike else cannot).append(f"{package} {other}, here {own}")
    return cannot, can


def _series(text: str) -> list[str]:
    first, *rest = text.split(".")
    return [first, *rest[:1]] if first == "0" else [first]


def code_root() -> Path:
    """The directory in which the package ``fedlora`` lies."""
    return _HOME.parent


def top_packages() -> tuple[str, ...]:
    """Names of the top-level packages that hold this code, sorted."""
    nested = all((_HOME / name).is_dir() for name in BESIDE)
    return ("fedlora",) if nested else tuple(sorted(("fedlora", *BESIDE)))


def examples() -> dict[str, Path]:
    """The configurations that come with the code, by name."""
    checkout = len(top_packages()) > 1
    folder = code_root() / "experiments" if checkout else _HOME / "examples"
    return {name: file for name in EXAMPLES if (file := folder / f"{name}.toml").is_file()}


def project_file() -> Path:
    """The ``pyproject.toml`` of this code, with ``LICENSE`` beside it; a wheel has copies of both."""
    beside = code_root() / "pyproject.toml"
    return beside if len(top_packages()) > 1 else _HOME / "pyproject.toml"


def prefer_own_code() -> None:
    """Look for imports beside this package first.

    A ``clients.py`` or a folder ``strategies`` in the working directory, which Ray puts before everything
    else in its processes, would otherwise hide the packages of a checkout.
    """
    if len(top_packages()) > 1:
        sys.path.insert(0, str(code_root()))


def refuse_hidden() -> None:
    """Refuse a user's module in the place of one of these packages, as beside a script that is run.

    Raises:
        ConfigError: there is one, with its path.
    """
    for name in top_packages():
        spec = find_spec(name)
        if spec is not None and spec.origin and Path(spec.origin).resolve().parents[1] != code_root():
            raise ConfigError(f"{spec.origin}: hides fedlora's own package {name!r}, give it another name")


def import_own(key: str, name: str) -> Any:
    """The object of a user's own behind ``module:Class``; modules are also looked for where one stands.

    Args:
        key: the key of the configuration that names it.
        name: ``module:Class``.

    Raises:
        ConfigError: it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ConfigError(f"{key} = {name!r}: cannot be imported ({named_line(error)})") from None
    finally:
        sys.path.remove(here)
