"""Cannot be imported."""

raise RuntimeError("no model at\n/models/x")
