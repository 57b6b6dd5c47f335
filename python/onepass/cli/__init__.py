"""The commands of ``python -m onepass``, and what times a step."""
