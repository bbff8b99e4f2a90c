"""The studio's state in a database: tables, transactions, and the way there from older forms."""
