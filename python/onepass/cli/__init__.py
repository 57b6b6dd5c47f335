"""The commands of ``python -m onepass``, and the timing harness."""
