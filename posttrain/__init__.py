"""From raw text to an assistant that reasons: one recipe a stage, each stage proved by a measured gain."""

import os

# Read when torch loads OpenMP, hence here. Its threads spin while they wait for each other: beside one other busy
# process, a loop of matrix products on two cores took 12.0 s so, and 2.9 s with passive waiting (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
