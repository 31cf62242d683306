"""smsd sends bulk SMS campaigns through Mitto's HTTP API, with Postgres as its queue."""

__version__ = "0.1.0"
