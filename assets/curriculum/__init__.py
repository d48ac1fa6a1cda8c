"""What the tiny checkpoint is pretrained on: pages with questions in other words than the sample tasks'."""
