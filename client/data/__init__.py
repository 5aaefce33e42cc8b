"""From a hospital's disk to checked, prepared cases."""
