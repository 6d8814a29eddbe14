"""Keeps transformers and peft from talking over Headstart's own output."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """While entered: no progress bars for work of a second, no load reports, no notices of deprecated calls.

    What a load report would say is checked and raised by the caller. Downloads keep their bars, and warnings that are
    meant for users come through.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    previous_hook = logging.set_tqdm_hook(lambda factory, args, kwargs: logging.EmptyTqdm(*args, **kwargs))
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logging.set_tqdm_hook(previous_hook)
        logging.set_verbosity(verbosity)
