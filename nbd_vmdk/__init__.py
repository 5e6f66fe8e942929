"""Any VMware virtual disk, read and written in place, and served over NBD."""

__version__ = "0.1.0"
