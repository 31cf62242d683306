"""The system tests: real processes, a real Postgres, and the Mitto simulator as their oracle."""
