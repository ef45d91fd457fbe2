"""Image statistics of the shapes world, for evaluations during training: FID, precision, recall, position spread."""
