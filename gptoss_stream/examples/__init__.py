"""Small pieces of interpretability on converted checkpoints, to run and to copy from."""
