"""Architectures that people know, as spec files; `heddle.specs.zoo_files` reads them."""
