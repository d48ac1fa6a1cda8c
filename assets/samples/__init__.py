"""What draws each task's sample data, one module a task."""
