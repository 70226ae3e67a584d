"""Data, the training run, its checkpoints and metrics; import what you need from the files of this package."""
