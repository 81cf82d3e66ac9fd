"""The protocol as pure functions: (state, input, now) -> (outcome, effects).

No clock, no randomness, no I/O.
"""
