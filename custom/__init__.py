"""Open radiotherapy dose prediction: everything the bundle's configs name."""

__version__ = "0.1.0"
