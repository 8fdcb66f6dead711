"""Servers that the tests run against, all on 127.0.0.1."""
