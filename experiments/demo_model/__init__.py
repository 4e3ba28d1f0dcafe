"""The language, the training and the variants of the embedded demo model."""
