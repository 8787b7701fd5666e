"""Formulas: torch, numpy and scipy only; no input or output, no Ray."""
