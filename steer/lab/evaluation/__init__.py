"""What a direction does to a model, measured so that it is hard to fool, in one report.

The command `steer eval` imports it; it imports the rest of `lab`.
"""
