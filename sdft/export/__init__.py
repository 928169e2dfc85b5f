"""A checkpoint as an ordinary Hugging Face folder."""
