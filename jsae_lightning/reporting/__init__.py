"""The report on one pair or on a sweep of pairs: readers of the evaluation's files, figures, and one HTML page."""
