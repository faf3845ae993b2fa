"""Floor 2: the five op families, one room each; rooms never import each other."""
