"""The slow twins of the operators, in plain torch."""
