"""Analysis of finished cells: results, summaries, curves and tested comparisons."""
