"""Aggregations: from the uploads of a round to the new global arrays."""
