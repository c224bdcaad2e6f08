"""DeepSpeed: teacher placement, the student's engine, gathering with gradient, the training loop, checkpoints, monitors."""
