"""Evaluate and explain: sampling, records, faithfulness, summaries."""
