"""Native classes of transformers that a spec may become: what fits, its configuration, the names of its weights. No torch."""
