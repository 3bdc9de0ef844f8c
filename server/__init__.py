"""The operator's side: rounds, aggregation, export, report."""
