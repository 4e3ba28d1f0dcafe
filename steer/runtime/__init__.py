"""What both engines share: the operation, the direction bank, the token index, and the hook points of a model.

Imports torch, files, names and the request language, and no engine. Everything above may import it.
"""
