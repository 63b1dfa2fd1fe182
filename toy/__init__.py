"""A synthetic tissue to learn on."""
