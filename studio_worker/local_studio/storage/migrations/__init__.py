"""The steps that a database takes to the present form of its tables, as Alembic runs them."""
