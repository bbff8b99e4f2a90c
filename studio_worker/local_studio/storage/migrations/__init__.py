"""The steps that a database takes to the present form of its tables, which are Alembic's."""
