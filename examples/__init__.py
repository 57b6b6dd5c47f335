"""The gallery: classic experiments, run with onepass. README.md shows them; ``python -m onepass gallery`` runs them."""
