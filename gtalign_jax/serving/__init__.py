"""Serving a policy over HTTP: the engine that fills batches, the endpoints, the page."""
