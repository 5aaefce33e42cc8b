"""Training at one hospital, with and without differential privacy."""
