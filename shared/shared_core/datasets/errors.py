"""The errors of the datasets package, each one line: the thing, what was got, what was expected."""

from __future__ import annotations


class DatasetError(ValueError):
    """A dataset, or one of its files, is not what was asked for. The message is one line."""


class DatasetNotFoundError(DatasetError, FileNotFoundError):
    """A folder or file of a dataset is not there. The message says how to get it."""


class DecodeError(DatasetError):
    """A file could not be decoded as an image. The message names the file."""


class UnsupportedImageError(DecodeError):
    """A whole image of a kind, or of a size, that is not read. The message says what to do."""
