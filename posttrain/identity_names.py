"""What is measured of who a model says it is, by the names that metrics and log.jsonl have for it.

In: nothing. Out: names, for posttrain/identity_eval.py, which measures, and for the report, which loads no model.
"""

RIGHT = "identity right"
KEPT = "identity kept against the system message"
YIELDED = "identity yields to the system message"
SERIES = {"identity/right": RIGHT, "identity/kept": KEPT, "identity/yields": YIELDED}  # in log.jsonl -> metric
