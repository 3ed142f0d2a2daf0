"""Tools that look at a transformed model and at the machine: what a step costs, what it should, and what it does.

Nothing here changes a result. ``explain`` estimates from recorded dry runs and a table of devices; ``bench`` measures,
after it has compared; ``calibrate`` measures the machine once for both.
"""
