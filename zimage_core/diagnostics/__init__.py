"""What went wrong: values that are not finite."""
