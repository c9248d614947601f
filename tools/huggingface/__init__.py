"""Models in Hugging Face's layout, in and out."""
