"""What a server ships, held against what is installed."""

from __future__ import annotations

from io import BytesIO
from zipfile import ZipFile

from fedlora.core.code import code_root, top_packages


def difference(bundle: bytes) -> str:
    """The first Python file of a bundle that is not the installed one; empty where all are the same.

    A file is decompressed only where it is as long as the installed one.

    Args:
        bundle: a zip file, as Flower ships it.
    """
    ours = {
        file.relative_to(code_root()).as_posix(): file
        for package in top_packages()
        for file in (code_root() / package).rglob("*.py")
        if not file.name.endswith("_test.py")  # Flower leaves these out of its bundles
    }
    try:
        with ZipFile(BytesIO(bundle)) as shipped:
            found = [info for info in shipped.infolist() if info.filename.endswith(".py")]
            missing = ours.keys() - {info.filename for info in found}
            if missing:
                return f"{min(missing)} is not shipped"
            for info in sorted(found, key=lambda info: info.filename):
                if info.filename not in ours:
                    return f"{info.filename!r} is shipped and not installed"
                own = ours[info.filename].read_bytes()
                if info.file_size != len(own) or shipped.read(info) != own:
                    return f"{info.filename} is not the installed one"
    except Exception as error:  # whatever a stranger's bytes make of a reader of zip files
        return f"it is no bundle that can be read ({type(error).__name__})"
    return ""
