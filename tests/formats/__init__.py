"""Every format of a model that is read here, against its reference: `python -m tests.formats` writes docs/formats.md."""
