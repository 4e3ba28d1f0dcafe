"""What a direction does to a model, measured so that it is not easily fooled, and one report of it."""
