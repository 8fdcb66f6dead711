"""Doors to the worker: each translates between one platform and `handler.run`."""
