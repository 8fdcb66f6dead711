"""A plugin of pytest for tests on a card: diffusers is imported as the worker imports it, before a test does so.

python -m pytest -p bench.card_tests -m gpu tests/engine/test_frames.py
"""

from engine.namesake import import_diffusers

import_diffusers()
