"""The HTTP side: carriers and receipts for any engine's routes, control routes, and an app for the own engine."""
