"""Tables that a program holds in memory, which no file can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedlora.data import from_dataframe
from fedlora.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1, 10**30], "column 'id' holds 10000000000000000000.. in row 2, must have 64 bits"),
        ([-(10**400), 1], "column 'id' holds .* in row 1, must have 64 bits"),
        (["a", "\ud83d"], "surrogates not allowed"),
        (["a", 1], "id"),
    ],
)
def test_what_no_table_holds_is_refused_in_one_line(values: list[Any], said: str, cache: Path) -> None:
    frame = pd.DataFrame({"text": ["a", "b"], "id": pd.Series(values, dtype=object)})
    with pytest.raises(ConfigError, match=f"from_dataframe: .*{said}") as caught:
        from_dataframe(frame)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()
