"""Where the embedded model comes from, and the study of the article that this project began with. Not installed.

It may import all of `steer`; nothing of `steer` imports it.
"""
