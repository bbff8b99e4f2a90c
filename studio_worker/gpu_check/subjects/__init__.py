"""What gpu-check looks at: one module a subject, and what several of them need."""
