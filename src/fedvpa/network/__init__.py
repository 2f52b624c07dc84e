"""The federation on Flower's deployment engine: the same algorithm as in the simulator, across
machines.

Nothing is imported here: a ClientApp process starts for every message, and has to start fast.
"""
