"""Build hook of the wheel: the folders ``strategies`` and ``clients`` become subpackages of ``fedlora``.

In the repository and in a Flower app bundle they lie beside ``fedlora``. An installed package must not claim
such common names, so the wheel holds ``fedlora.strategies`` and ``fedlora.clients``, with every import of the
two rewritten. Editable installs are left as they are.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

INNER = ("strategies", "clients")
"""Folders that move below ``fedlora``; modules of these names there are their stand-ins in a checkout."""
IMPORT = re.compile(rf"(?m)(^\s*(?:from|import)\s+|import_module\(\")(?=(?:{'|'.join(INNER)})\b)")
EXAMPLES = ("demo", "tiny", "private", "images", "novels", "federation", "audit")
"""As in `fedlora.core.code`, which cannot be imported here."""
KEPT = (".py", ".pyi", ".typed", ".html", ".css", ".js", ".sh", ".service", ".toml")


class NestedPackages(BuildHookInterface):  # type: ignore[type-arg]
    """Copies the three packages into one, imports rewritten."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the rewritten copy to a wheel; nothing to do for an editable install."""
        if version == "editable":
            return
        self._copy = tempfile.mkdtemp(prefix="fedlora-wheel-")
        top, inside = Path(self.root), Path(self._copy) / "fedlora"
        for source, target in [("fedlora", inside), *((name, inside / name) for name in INNER)]:
            for file in sorted((top / source).rglob("*")):
                where = file.relative_to(top / source)
                if file.suffix not in KEPT or (source == "fedlora" and str(where) in _STAND_INS):
                    continue
                (target / where).parent.mkdir(parents=True, exist_ok=True)
                if file.suffix in (".py", ".pyi"):
                    (target / where).write_text(IMPORT.sub(r"\1fedlora.", file.read_text()))
                else:
                    shutil.copyfile(file, target / where)
        for name in ("pyproject.toml", "LICENSE"):  # what a Flower app is declared by
            shutil.copyfile(top / name, inside / name)
        (inside / "examples").mkdir()
        for file in sorted((top / "experiments").glob("*.toml")):
            if file.stem in EXAMPLES:
                shutil.copyfile(file, inside / "examples" / file.name)
        build_data["force_include"][str(inside)] = "fedlora"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the copy."""
        if version != "editable":
            shutil.rmtree(self._copy, ignore_errors=True)


_STAND_INS = {f"{name}.py" for name in INNER}
