"""Numbers and pictures out of a policy: pass@k with intervals, held-out runs, reports."""
