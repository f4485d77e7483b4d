"""Which llmpipe this is, for the build and for the package, whose own module loads all others on demand."""

__version__ = "0.1.0"
