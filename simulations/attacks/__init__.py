"""Attacks on our own training, small enough to be tests, each with a figure.

Every one must succeed where nothing protects, or it would show nothing where something does.
"""
