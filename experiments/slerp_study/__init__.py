"""The study: the slerp family against the other methods, on one model or many."""
