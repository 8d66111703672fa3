"""Before torch is imported anywhere: two workers on two cores do best with a thread each."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
