"""Which llmpipe this is; apart from the package's own module, which names all others."""

__version__ = "0.1.0"
