"""Measurements that compare StrataKV with others; not part of the package."""
