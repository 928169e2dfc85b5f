"""Whether a model in use still does what it did when it was let out."""
