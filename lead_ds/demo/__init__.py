"""The main job on data and a model that every machine has after installation: no network, no GPU, ten minutes."""
