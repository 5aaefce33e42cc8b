"""The coordinator: rounds, checkpoints, reports. It never sees a patient."""
