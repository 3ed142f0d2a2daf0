"""``python -m fxcurv.cli``."""

from fxcurv.cli.main import main

main()
