"""The benchmark: methods against one another on streams of new data, everything else equal."""
