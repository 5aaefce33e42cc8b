"""What the fault campaign stands on: real processes, a chaos proxy, broken commands, the table."""
