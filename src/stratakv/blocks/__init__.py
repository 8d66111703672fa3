"""Ids, bytes and sequences."""
