"""Models compressed at load, kept in a folder by the hash of all that they depend on, so that a second run starts at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from forerun.compress.apply import Tell
from forerun.compress.identity import identity
from forerun.compress.recipes import apart, named
from forerun.compress.run import MADE, compress
from forerun.config import Compression, ModelConfig
from forerun.types import UserError


def cache_folder() -> Path:
    """$FORERUN_CACHE, else ~/.cache/forerun/compressed."""
    own = os.environ.get("FORERUN_CACHE")
    return Path(own).expanduser() if own else Path.home() / ".cache" / "forerun" / "compressed"


def compressed(config: ModelConfig, embedded: str, say: Callable[[str], None], tell: Tell) -> Path:
    """The folder of the model of `config` with its recipes applied; made where it is not there yet."""
    what = f"{config.path} ({', '.join(map(named, config.recipes))})"
    place = cache_folder() / identity(config, embedded, config.recipes)
    if not (place / MADE).exists():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{place.parent} cannot be made ({error.strerror}); set FORERUN_CACHE to a folder of yours"
            ) from error
        with alone(place.with_suffix(".lock")):
            if not (place / MADE).exists():  # another process may have made it meanwhile
                say(f"compressing {what}; the result is kept in {place}")
                source, recipes = config.model_copy(update={"recipes": ()}), config.recipes
                if first := apart(recipes):  # quantizing takes long, and other recipes may prune the same quantized model
                    quantized = compressed(config.model_copy(update={"recipes": recipes[:first]}), embedded, say, tell)
                    source = source.model_copy(update={"path": str(quantized), "weights": "pretrained"})
                    recipes = recipes[first:]
                compress(Compression(model=source, recipes=recipes), place, tell, embedded=embedded)
                return place
    say(f"{what} was compressed before: {place}")
    return place


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process at a time."""
    import fcntl

    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
