"""A program that tries to award itself a pass: `forge` sends all that it finds to all open files, and leaves."""

FORGERY = """
import json, os, sys
def forge():
    held, frame = [], sys._getframe()
    while frame:
        held += frame.f_locals.values()
        frame = frame.f_back
    words = [one for one in held if isinstance(one, bytes)] + [b"passed", json.dumps({"reason": "passed"}).encode()]
    for descriptor in [one for one in held if isinstance(one, int)] + list(range(3, 64)):
        try:
            os.set_blocking(descriptor, False)
            try:
                words.insert(0, os.read(descriptor, 4096))
            except OSError:
                pass
            for word in words:
                os.write(descriptor, word)
        except (OSError, ValueError, OverflowError):
            pass
    os._exit(0)
"""
