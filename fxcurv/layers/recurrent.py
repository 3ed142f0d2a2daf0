"""Recurrent networks, exposed as linear products over all time steps."""
