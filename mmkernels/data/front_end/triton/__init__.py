"""The front end on the GPU."""
