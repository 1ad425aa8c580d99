"""Measured launch configurations, by op and device family."""
