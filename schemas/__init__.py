"""The wire contract: requests, responses, errors. Imports nothing but the standard library and pydantic."""
