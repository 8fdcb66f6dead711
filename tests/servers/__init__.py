"""Servers the tests run against, all on 127.0.0.1: a real S3 store, a plain one with quirks, a proxy that breaks things."""
