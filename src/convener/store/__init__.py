"""Where the protocol's state lives. `base` states the obligations; memory, SQLite and Redis/Valkey meet them."""
