"""Bilinear products."""
