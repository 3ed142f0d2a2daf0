"""The one exception fxcurv raises on purpose.

A message is one sentence: what is wrong, where (layer, parameter, node), what to do.
The command line prints it alone; a traceback appears only with ``--debug``.
"""


class FxcurvError(Exception):
    """Bad input or an unsupported situation, explained in one sentence."""


class FxcurvWarning(UserWarning):
    """Something worth knowing that did not stop the run; issued once per cause."""
