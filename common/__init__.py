"""The vocabulary that both sides speak: files, messages, tasks, models, metrics, privacy."""
