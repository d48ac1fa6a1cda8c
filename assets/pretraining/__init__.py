"""How the tiny checkpoint is pretrained: its model, its stages, and pages with questions in other words than the samples'."""
