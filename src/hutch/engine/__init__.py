"""Isolation engines behind the small interface of `hutch.engine.base`."""
