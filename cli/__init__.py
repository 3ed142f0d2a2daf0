"""The command line: one file a verb, ``render`` for everything that is drawn, ``modelfile`` for the user's file."""
