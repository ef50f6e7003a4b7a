"""Alembic scripts of the catalog. A schema change is a new file in `versions`, never an edit."""
