"""Engines that give the clipped sum of a group of units; all give the same numbers."""
