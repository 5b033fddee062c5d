"""Local training of one client, of a cohort of clients in one pass, and under DP-SGD."""
