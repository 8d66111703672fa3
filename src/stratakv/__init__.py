"""StrataKV: a paged, verified key/value cache for autoregressive Transformers."""
