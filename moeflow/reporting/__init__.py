"""Benchmarks as people read them: text tables, Markdown, one JSON line, a plot. Knows documents, measures nothing."""
