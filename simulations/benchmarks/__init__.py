"""Speed and memory against what else there is: one file a table, rivals in the same run."""
