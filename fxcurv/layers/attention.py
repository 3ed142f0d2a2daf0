"""Attention modules, exposed as projections around a scaled dot product."""
