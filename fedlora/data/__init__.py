"""Examples: loaded, split, tokenised once, partitioned over clients, read back by memory map."""
