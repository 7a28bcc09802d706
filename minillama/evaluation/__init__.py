"""Judging models: statistics, perplexity, and tinyworld's gold standard. Training stages never import this package."""
