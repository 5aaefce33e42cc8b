"""Many sites on one machine: the same apps under an in-process grid."""
