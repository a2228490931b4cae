"""EMO: pre-training whose pool of experts grows in stages (arXiv 2605.13247)."""
