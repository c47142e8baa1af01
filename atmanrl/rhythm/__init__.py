"""The rhythm of attention and credit assigned by it (arXiv 2510.13554)."""
