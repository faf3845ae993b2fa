"""Floor 1: the engines every room stands on."""
