"""`make bench-dualpath`: what every route is worth on links of a known rate. Start reading at `__main__.py`."""
