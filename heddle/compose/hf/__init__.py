"""The Hugging Face side: the model class itself, its export, and the check of an export."""
