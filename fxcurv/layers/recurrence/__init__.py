"""Recurrent networks as visible products: what :mod:`fxcurv.layers.recurrent` puts together.

A recurrent layer is three nodes: the input product of all time steps, the hidden product of all time steps (whose
value the time loop has found already) and the adjoint, whose backward runs the loop in reverse. So each weight meets
data in one product with time as a position axis, and its gradient is one matrix product instead of one a step.
"""
