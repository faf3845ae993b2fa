"""Where other libraries' models meet our ops; nothing in the package imports this floor."""
