"""Graph convolutions: the parametrised products inside message passing."""
