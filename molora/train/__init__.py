"""Training: data, the Trainer glue, and the runs behind `molora train` and `molora eval`."""
