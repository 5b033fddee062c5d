"""Examples: loaded, split, tokenised once, partitioned over clients, read back by memory map.

For users: `from_dataframe` and `from_datasets`.
"""

from fedlora.data.frames import from_dataframe, from_datasets

__all__ = ["from_dataframe", "from_datasets"]
