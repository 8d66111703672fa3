"""Measurements that users can repeat.

| module | what it is |
| --- | --- |
| `scaling` | what one token costs at each length, with the cache and without |
| `growth` | bytes that a layout copies while it grows |
| `fit` | a power law with an intercept, fitted to measured costs |
| `samples` | repeated timings and their spread |
| `machine` | where it was measured |
| `report` | tables for a terminal |
"""
