"""Offline: measure a model on two contrast sets, make a direction, and prove what it does."""
