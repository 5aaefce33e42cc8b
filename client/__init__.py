"""The hospital: data, training, privacy, and the app that answers the coordinator."""
